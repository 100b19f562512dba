"""Measure recordings: lengths from headers, content keys from both ends, kept between runs."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError, AudioSpan, measure, measure_object
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
    rows: list[dict[str, Any]], manifest: StoragePath, cache_dir: StoragePath | None, threads: int
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Add `samples` and `key` to rows, without opening files that have not changed."""
    known = _Measurements(manifest, cache_dir)
    results = measure_rows(rows, known, threads)
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


def measure_rows(
    rows: list[dict[str, Any]], known: _Measurements | None = None, threads: int = 8
) -> list[dict[str, Any] | AudioError]:
    """Measure `samples` and `key` of each row, or return the error that makes it unusable."""
    known = known or _Measurements(Path(), None)
    objects = _objects(rows)
    with ThreadPoolExecutor(max(threads, _REQUESTS) if objects else threads) as pool:
        if known.kept:
            known.marks = _marks(objects, pool)
        return list(pool.map(lambda row: _measure_row(row, known), rows))


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


def _measure_row(row: dict[str, Any], known: _Measurements) -> dict[str, Any] | AudioError:
    """Measure the recordings of a row; return the first error, if any."""
    if row["audios"] is None:
        return _measure_one(row, known)
    measured = []
    for place in row["audios"]:
        found = _measure_one(place, known)
        if isinstance(found, AudioError):
            return found
        measured.append({**place, **found})
    key = digest(" ".join(m["key"] for m in measured), size=16)
    samples = sum(m["samples"] for m in measured)
    return {"samples": samples, "key": key, "audios": measured}


def _measure_one(row: dict[str, Any], known: _Measurements) -> dict[str, Any] | AudioError:
    path = literal_path(row["uri"])
    span = span_of(row)
    name = [row["uri"], row["start"], row["duration"]]
    try:
        if isinstance(path, ObjectPath):
            if known.kept and row["uri"] not in known.marks:
                raise AudioError("missing", f"no such object: {path}")
            name += [known.marks[row["uri"]]] if known.kept else []
        else:
            status = _status(path)
            name += [status.st_size, status.st_mtime_ns]
        name += [span.bytes] if span.bytes else []
        if (kept := known.get(repr(name))) is not None:
            return kept
        if isinstance(path, ObjectPath):
            result = retry_storage(lambda: _measure_object(path, row), seconds=_PATIENCE_SECONDS)
        else:
            result = {"samples": measure(path, span), "key": _content_key(row, status.st_size)}
    except AudioError as error:
        return error
    known.put(repr(name), result)
    return result


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:
        raise AudioError("missing", f"no such file: {path}") from None


def _measure_object(path: ObjectPath, row: dict[str, Any]) -> dict[str, Any]:
    """Measure `samples` and `key` of an object, reading as little of it as possible.

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
        if length <= 2 * _EDGE:
            return measure_data(file.read_at(length, first), start, duration)
        known = {at: file.read_at(_EDGE, first + at) for at in (0, length - _EDGE)}
        key = _key(
            lambda at, n: known[at] if at in known else file.read_at(n, first + at),
            length,
            start,
            duration,
        )
        span = AudioSpan(start, duration)
        samples = measure_object(file, (first, length), span, str(path), known)  # closes it
    return {"samples": samples, "key": key}


def measure_data(data: bytes, start: float, duration: float | None) -> dict[str, Any]:
    """Measure `samples` and `key` of an encoded audio file in memory.

    Raises AudioError.
    """
    samples = measure(data, AudioSpan(start, duration))
    key = _key(lambda at, n: data[at : at + n], len(data), start, duration)
    return {"samples": samples, "key": key}


def _content_key(row: dict[str, Any], size: int) -> str:
    first, length = (0, size) if row["length"] is None else (row["offset"], row["length"])
    with open(row["uri"], "rb") as file:

        def read(at: int, count: int) -> bytes:
            file.seek(first + at)
            return file.read(count)

        return _key(read, length, row["start"], row["duration"])


def _key(read: Callable[[int, int], bytes], size: int, start: float, duration: float | None) -> str:
    """Hash size, span and both ends of a recording.

    All bytes count of a small recording, and of one that begins and ends in silence: others of the
    same size may do so too. read(offset, count): up to `count` bytes from `offset` on.
    """
    state = hashlib.blake2b(f"{size} {start} {duration}".encode(), digest_size=16)
    last = max(_EDGE, size - _EDGE)
    head, tail = read(0, min(_EDGE, size)), read(last, size - last) if size > last else b""
    state.update(head)
    if last > _EDGE and _is_silent(tail) and _is_silent(head):
        for at in range(_EDGE, last, _BLOCK):
            state.update(read(at, min(_BLOCK, last - at)))
    state.update(tail)
    return state.hexdigest()


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
                self._values[row.pop("file")] = row
        except (OSError, pa.ArrowException, KeyError):
            self._values = {}  # Missing or damaged: measure again.

    @property
    def kept(self) -> bool:
        return self._path is not None

    def get(self, name: str) -> dict[str, Any] | None:
        return self._values.get(name)

    def put(self, name: str, value: dict[str, Any]) -> None:
        self._values[name] = value
        self._fresh = True

    def save(self) -> None:
        if self._path is None or not self._fresh:
            return
        rows = [{"file": name, **value} for name, value in self._values.items()]
        made = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), made)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, made.getvalue().to_pybytes())
