"""Keep measurements of recordings between runs, by name, size and time of their files."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError
from omni.corpus.content_key import whole_key
from omni.corpus.index_row import span_of
from omni.storage.atomic import write_atomic
from omni.storage.digest import digest
from omni.storage.path import ObjectPath, StoragePath, literal_path


class Measurements:
    """Measurements of a manifest's files, kept as Parquet between runs."""

    def __init__(self, manifest: StoragePath, cache_dir: StoragePath | None) -> None:
        self._values: dict[str, dict[str, Any]] = {}
        self._older: set[str] = set()  # measured by a version whose keys covered both ends only
        self._middles: dict[Any, bytes] = {}
        self._lock = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}
        self.marks: dict[str, str] = {}  # size and time of objects, where measurements are kept
        self._fresh = False
        self._path: StoragePath | None = None
        if cache_dir is None:
            return
        name = digest(str(manifest), size=8)
        self._path = cache_dir / f"index-{name}.parquet"
        try:
            with self._path.open("rb") as file:
                kept = pq.read_table(file)
            for row in kept.to_pylist():
                name = row.pop("file")
                if row.pop("complete", None) is None:
                    self._older.add(name)
                self._values[name] = row
        except (OSError, pa.ArrowException, KeyError):
            self._values = {}  # Missing or damaged: measure again.

    @property
    def kept(self) -> bool:
        return self._path is not None

    def get(self, name: str) -> dict[str, Any] | None:
        return self._values.get(name)

    def put(self, name: str, value: dict[str, Any]) -> None:
        self._values[name] = value
        self._older.discard(name)
        self._fresh = True

    def middle(self, recording: tuple[str, int, int], make: Callable[[], bytes]) -> bytes:
        """Return the hash of the middle of a recording, made once for all of its spans."""
        with self._lock:
            lock = self._locks.setdefault(recording, threading.Lock())
        with lock:
            if recording not in self._middles:
                self._middles[recording] = make()
            return self._middles[recording]

    def part_namesakes(self, rows: list[dict[str, Any]]) -> None:
        """Measure recordings anew that share the key of an older version but differ in content.

        All others keep their keys of before, under which their features are in the cache.
        """
        if not self._older:
            return
        by_key: dict[str, dict[str, dict[str, Any]]] = {}
        for place in (place for row in rows for place in row["audios"] or [row]):
            with contextlib.suppress(AudioError):
                name, _ = measurement_name(place, literal_path(place["uri"]), self)
                if name in self._older:
                    by_key.setdefault(self._values[name]["key"], {})[name] = place
        for alike in by_key.values():
            if len(alike) > 1 and len({whole_key(place) for place in alike.values()}) > 1:
                for name in alike:
                    del self._values[name]
            self._older -= alike.keys()
            self._fresh = True

    def save(self) -> None:
        if self._path is None or not self._fresh:
            return
        rows = [
            {"file": name, **value, "complete": None if name in self._older else True}
            for name, value in self._values.items()
        ]
        made = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), made)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, made.getvalue().to_pybytes())


def measurement_name(
    row: Mapping[str, Any], path: StoragePath, known: Measurements
) -> tuple[str, int]:
    """Return what names the measurement of a recording, and the size of a local file.

    The name is that of older versions: their measurements are found. Raises AudioError.
    """
    span, size = span_of(row), 0
    name = [row["uri"], row["start"], row["duration"]]
    if isinstance(path, ObjectPath):
        if known.kept and row["uri"] not in known.marks:
            raise AudioError("missing", f"no such object: {path}")
        name += [known.marks[row["uri"]]] if known.kept else []
    else:
        status = _status(path)
        size = status.st_size
        name += [status.st_size, status.st_mtime_ns]
    name += [span.bytes] if span.bytes else []
    return repr(name), size


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:
        raise AudioError("missing", f"no such file: {path}") from None
