"""Measure recordings: their lengths and the keys of their content, kept between runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError, AudioSpan, measure
from omni.audio.windows import SAMPLING_RATE
from omni.config.settings import DataConfig
from omni.errors import located
from omni.storage.atomic import write_atomic
from omni.storage.digest import digest
from omni.storage.path import ObjectPath, StoragePath, literal_path
from omni.storage.retry import retry_storage

_REQUESTS = 32  # concurrent requests to object storage; each mostly waits
_LISTED = 1000  # List a folder once this many of its objects are named.
_PATIENCE_SECONDS = 60.0  # Retry unavailable storage for this long.
_EDGE = 64 * 1024  # bytes hashed at each end of a file
_SILENT = 1 / 16  # Silence compresses below this share; speech in no format does.
_BLOCK = 4 << 20  # bytes read at a time
_ROUNDING_SECONDS = 0.1  # by which a manifest may be wrong about any recording
DURATION_TOLERANCE = DataConfig().duration_tolerance


@dataclass(frozen=True)
class Reject:
    """An utterance that is left out, with a short reason."""

    id: str
    uri: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def measure_all(
    rows: list[dict[str, Any]],
    manifest: StoragePath,
    cache_dir: StoragePath | None,
    threads: int,
    tolerance: float = DURATION_TOLERANCE,
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Add `samples` and `key` to rows, without opening files that have not changed.

    tolerance: see `check_stated`.
    """
    known = _Measurements(manifest, cache_dir)
    results = measure_rows(rows, known, threads, tolerance)
    good: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, AudioError):
            rejects.append(Reject(row["id"], row["uri"], result.reason, result.detail))
        elif not row["text"]:
            rejects.append(Reject(row["id"], row["uri"], "empty text", "nothing to learn from"))
        else:
            good.append({**row, **result})
    known.save()
    return good, rejects


class Measuring:
    """Measurement of the rows of one part of an index; the spans of a recording share its hash.

    tolerance: see `check_stated`.
    """

    def __init__(self, tolerance: float = DURATION_TOLERANCE) -> None:
        self._tolerance = tolerance
        self._known = _Measurements(Path(), None)

    def rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | AudioError]:
        """Measure rows that name their recordings, as `measure_rows`."""
        return measure_rows(rows, self._known, tolerance=self._tolerance)

    def data(self, data: bytes, row: Mapping[str, Any]) -> dict[str, Any]:
        """Measure a row that holds its recording. Raises AudioError."""
        try:
            found = measure_data(data, row["start"], row["duration"])
        except (AudioError, OSError):
            raise
        except Exception as error:
            raise located(error, row["id"]) from error
        check_stated({**row, "uri": row["id"]}, found["samples"], self._tolerance)
        return found


def measure_rows(
    rows: list[dict[str, Any]],
    known: _Measurements | None = None,
    threads: int = 8,
    tolerance: float = DURATION_TOLERANCE,
) -> list[dict[str, Any] | AudioError]:
    """Measure `samples` and `key` of each row, or return the error that makes it unusable."""
    known = known or _Measurements(Path(), None)
    objects = _objects(rows)
    with ThreadPoolExecutor(max(threads, _REQUESTS) if objects else threads) as pool:
        if known.kept:
            known.marks = _marks(objects, pool)
        known.part_namesakes(rows)
        return list(pool.map(lambda row: _measure_row(row, known, tolerance), rows))


def _objects(rows: list[dict[str, Any]]) -> set[str]:
    """Return the URIs of recordings in object storage."""
    named = (place["uri"] for row in rows for place in row["audios"] or [row])
    return {uri for uri in named if "://" in uri}


def _marks(uris: set[str], pool: ThreadPoolExecutor) -> dict[str, str]:
    """Return size and time of each object, which change with it; leave out missing ones.

    Where many objects of a folder are named, one listing tells of a thousand at a time.
    """
    folders: dict[ObjectPath, list[str]] = {}
    for uri in uris:
        path = literal_path(uri)
        assert isinstance(path, ObjectPath)
        folders.setdefault(path.parent, []).append(uri)

    def look(asked: tuple[ObjectPath, list[str]]) -> dict[str, str]:
        folder, named = asked
        if len(named) >= _LISTED:
            found = {f"{folder}/{info.base_name}": info for info in retry_storage(folder.listing)}
        else:
            [uri] = named
            found = {uri: retry_storage((folder / uri.rpartition("/")[2]).info)}
        return {
            uri: f"{found[uri].size} {int(found[uri].mtime_ns or 0) // 10**9}"
            for uri in named
            if uri in found and found[uri].is_file
        }

    asked: list[tuple[ObjectPath, list[str]]] = []
    for folder, named in folders.items():
        asked += [(folder, named)] if len(named) >= _LISTED else [(folder, [u]) for u in named]
    return {uri: mark for found in pool.map(look, asked) for uri, mark in found.items()}


def _measure_row(
    row: dict[str, Any], known: _Measurements, tolerance: float
) -> dict[str, Any] | AudioError:
    """Measure the recordings of a row; return the first error, if any.

    Raises RuntimeError naming the row for an error that no recording should cause.
    """
    try:
        if row["audios"] is None:
            return _measure_one(row, known, tolerance)
        measured = []
        for place in row["audios"]:
            found = _measure_one(place, known, tolerance)
            if isinstance(found, AudioError):
                return found
            measured.append({**place, **found})
    except OSError:
        raise  # Storage may answer later.
    except Exception as error:
        raise located(error, f"{row['id']} ({row['uri']})") from error
    key = digest(" ".join(m["key"] for m in measured), size=16)
    samples = sum(m["samples"] for m in measured)
    return {"samples": samples, "key": key, "audios": measured}


def _measure_one(
    row: dict[str, Any], known: _Measurements, tolerance: float
) -> dict[str, Any] | AudioError:
    path = literal_path(row["uri"])
    try:
        name, size = _name_of(row, path, known)
        result = known.get(name)
        if result is None and isinstance(path, ObjectPath):
            result = retry_storage(lambda: _measure_object(path, row), seconds=_PATIENCE_SECONDS)
            known.put(name, result)
        elif result is None:
            samples = measure(path, span_of(row))
            result = {"samples": samples, "key": _content_key(row, size, known)}
            known.put(name, result)
        check_stated(row, result["samples"], tolerance)
    except AudioError as error:
        return error
    return result


def check_stated(row: Mapping[str, Any], samples: int, tolerance: float) -> None:
    """Raise AudioError for a recording that is clearly shorter than its manifest says.

    tolerance: share of the stated duration that may be missing.
    """
    stated, seconds = row.get("stated_duration"), samples / SAMPLING_RATE
    if stated is not None and seconds < stated * (1 - tolerance) - _ROUNDING_SECONDS:
        raise AudioError(
            "shorter than the manifest says", f"{row['uri']}: {seconds:.2f} s of {stated:.2f} s"
        )


def _name_of(row: Mapping[str, Any], path: StoragePath, known: _Measurements) -> tuple[str, int]:
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


def _measure_object(path: ObjectPath, row: dict[str, Any]) -> dict[str, Any]:
    """Measure `samples` and `key` of an object: all of its bytes are read, in large requests.

    Raises AudioError, and OSError for storage that does not answer.
    """
    try:
        file = path.ranges()
    except FileNotFoundError:
        raise AudioError("missing", f"no such object: {path}") from None
    start, duration = row["start"], row["duration"]
    with file:
        size = file.size()
        first, length = (0, size) if row["length"] is None else (row["offset"], row["length"])
        there = min(length, max(0, size - first))
        if there < length or not there:
            raise AudioError("unreadable", f"{path}: {there} of {length} bytes are there")
        if length <= _BLOCK:
            return measure_data(file.read_at(length, first), start, duration)
        samples = measure(path, span_of(row))

        def read(at: int, count: int) -> bytes:
            return bytes(file.read_at(count, first + at))

        return {"samples": samples, "key": _key(read, length, start, duration)}


def measure_data(data: bytes, start: float, duration: float | None) -> dict[str, Any]:
    """Measure `samples` and `key` of an encoded audio file in memory.

    Raises AudioError.
    """
    samples = measure(data, AudioSpan(start, duration))

    def read(at: int, count: int) -> bytes:
        return data[at : at + count]

    return {
        "samples": samples,
        "key": _key(read, len(data), start, duration, lambda: _middle_of(data)),
    }


def _content_key(row: dict[str, Any], size: int, known: _Measurements) -> str:
    first, length = (0, size) if row["length"] is None else (row["offset"], row["length"])
    with open(row["uri"], "rb") as file:

        def read(at: int, count: int) -> bytes:
            file.seek(first + at)
            return file.read(count)

        def middle() -> bytes:
            return known.middle((row["uri"], first, length), lambda: _middle(read, length))

        return _key(read, length, row["start"], row["duration"], middle)


def _key(
    read: Callable[[int, int], bytes],
    size: int,
    start: float,
    duration: float | None,
    middle: Callable[[], bytes] | None = None,
) -> str:
    """Hash size, span and all bytes of a recording.

    read(offset, count): up to `count` bytes from `offset` on. middle: the hash of what is between
    both ends, which the spans of a long recording share.

    Keys of older versions stay: they covered all bytes of recordings of up to 128 KiB, and of those
    that begin and end in silence, and are made here in the same way, so that a corpus indexed anew
    finds their features. Of other recordings they covered both ends only. Rows of an index, and
    kept measurements, have them still, and find the features under them; see
    `_Measurements.part_namesakes`.
    """
    state = hashlib.blake2b(f"{size} {start} {duration}".encode(), digest_size=16)
    last = max(_EDGE, size - _EDGE)
    head, tail = read(0, min(_EDGE, size)), read(last, size - last) if size > last else b""
    state.update(head)
    if last > _EDGE:
        if _is_silent(tail) and _is_silent(head):
            for at in range(_EDGE, last, _BLOCK):
                state.update(read(at, min(_BLOCK, last - at)))
        else:
            state.update(middle() if middle else _middle(read, size))
    state.update(tail)
    return state.hexdigest()


def _middle(read: Callable[[int, int], bytes], size: int) -> bytes:
    """Hash the bytes between both ends of a recording."""
    state = hashlib.blake2b(digest_size=32)
    for at in range(_EDGE, size - _EDGE, _BLOCK):
        state.update(read(at, min(_BLOCK, size - _EDGE - at)))
    return state.digest()


@functools.lru_cache(maxsize=1)
def _middle_of(data: bytes) -> bytes:
    """Hash the middle of a recording in memory, once for the spans that are cut from it."""
    return _middle(lambda at, count: data[at : at + count], len(data))


def _is_silent(data: bytes) -> bool:
    middle = data[len(data) // 2 :][:4096]  # enough to recognise speech quickly
    return all(len(zlib.compress(part, 1)) < _SILENT * len(part) for part in (middle, data))


def span_of(row: Mapping[str, Any]) -> AudioSpan:
    """Return the span of the file that an index row stands for."""
    inside = None if row["length"] is None else (row["offset"], row["length"])
    return AudioSpan(row["start"], row["duration"], inside)


class _Measurements:
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
                name, _ = _name_of(place, literal_path(place["uri"]), self)
                if name in self._older:
                    by_key.setdefault(self._values[name]["key"], {})[name] = place
        for alike in by_key.values():
            if len(alike) > 1 and len({_whole_key(place) for place in alike.values()}) > 1:
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


def _whole_key(place: Mapping[str, Any]) -> str:
    """Hash all bytes of a recording; one that cannot be read differs from all others."""
    path, span = literal_path(place["uri"]), span_of(place)
    state = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            first, left = span.bytes or (0, 1 << 62)
            file.seek(first)
            while left > 0 and (block := file.read(min(_BLOCK, left))):
                state.update(block)
                left -= len(block)
    except OSError:
        return str(place["uri"])
    return state.hexdigest()
