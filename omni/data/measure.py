"""Lengths and content keys of recordings, from their headers and edges, kept between runs."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.data.audio import AudioError, AudioSpan, measure
from omni.place import ObjectPath, Place, write_whole
from omni.place import place as at

_REQUESTS = 32  # to object storage at a time: they wait more than they work
_EDGE = 64 * 1024  # bytes hashed at each end of a file


@dataclass(frozen=True)
class Reject:
    """An utterance that is left out, with a reason of a few words."""

    id: str
    uri: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def measure_all(
    rows: list[dict[str, Any]], manifest: Place, cache_dir: Place | None, threads: int
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Add `samples` and `key` to rows; unchanged files are not opened again."""
    known = _Measurements(manifest, cache_dir)
    if isinstance(manifest, ObjectPath):
        threads = max(threads, _REQUESTS)
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
    """`samples` and `key` of each row, or why it cannot be used."""
    known = known or _Measurements(Path(), None)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda row: _measure_row(row, known), rows))


def _measure_row(row: dict[str, Any], known: _Measurements) -> dict[str, Any] | AudioError:
    """What a row's recordings measure; the first error of several."""
    if row["audios"] is None:
        return _measure_one(row, known)
    measured = []
    for place in row["audios"]:
        found = _measure_one(place, known)
        if isinstance(found, AudioError):
            return found
        measured.append({**place, **found})
    joined = hashlib.blake2b(" ".join(m["key"] for m in measured).encode(), digest_size=16)
    samples = sum(m["samples"] for m in measured)
    return {"samples": samples, "key": joined.hexdigest(), "audios": measured}


def _measure_one(row: dict[str, Any], known: _Measurements) -> dict[str, Any] | AudioError:
    found = _size_and_time(at(row["uri"]))
    if found is None:
        return AudioError("missing", f"no such file: {row['uri']}")
    size, time_ns = found
    span = span_of(row)
    name = [row["uri"], row["start"], row["duration"], size, time_ns]
    name += [span.bytes] if span.bytes else []
    if (kept := known.get(repr(name))) is not None:
        return kept
    try:
        samples = measure(row["uri"], span)
        result = {"samples": samples, "key": _content_key(row, size)}
    except AudioError as error:
        return error
    known.put(repr(name), result)
    return result


def _size_and_time(path: Place) -> tuple[int, int] | None:
    """Bytes, and when they were written; None: there is no such file."""
    if isinstance(path, ObjectPath):
        info = path.info()
        return (info.size, info.mtime_ns) if info.is_file else None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def measure_data(data: bytes, start: float, duration: float | None) -> dict[str, Any]:
    """`samples` and `key` of an encoded audio file in memory, as of the same file on disk.

    Raises AudioError.
    """
    samples = measure(data, AudioSpan(start, duration))
    ends = data[:_EDGE], data[max(_EDGE, len(data) - _EDGE) :]
    return {"samples": samples, "key": _key(len(data), start, duration, *ends)}


def _content_key(row: dict[str, Any], size: int) -> str:
    first, size = (0, size) if row["length"] is None else (row["offset"], row["length"])
    path = at(row["uri"])
    with path.open("rb") if isinstance(path, Path) else path.ranges() as file:
        file.seek(first)
        head, tail = file.read(min(_EDGE, size)), b""
        if size > _EDGE:
            file.seek(first + max(_EDGE, size - _EDGE))
            tail = file.read(min(_EDGE, size - _EDGE))
    return _key(size, row["start"], row["duration"], head, tail)


def _key(size: int, start: float, duration: float | None, head: bytes, tail: bytes) -> str:
    """Hash of the recording's size and both ends (all of a small one) and of the span in it."""
    digest = hashlib.blake2b(f"{size} {start} {duration}".encode(), digest_size=16)
    digest.update(head)
    digest.update(tail)
    return digest.hexdigest()


def span_of(row: dict[str, Any]) -> AudioSpan:
    """Where the utterance of an index row lies in its file."""
    inside = None if row["length"] is None else (row["offset"], row["length"])
    return AudioSpan(row["start"], row["duration"], inside)


class _Measurements:
    """What earlier runs measured of one manifest's files, kept as Parquet."""

    def __init__(self, manifest: Place, cache_dir: Place | None) -> None:
        self._values: dict[str, dict[str, Any]] = {}
        self._fresh = False
        self._path: Place | None = None
        if cache_dir is None:
            return
        name = hashlib.blake2b(str(manifest).encode(), digest_size=8).hexdigest()
        self._path = cache_dir / f"index-{name}.parquet"
        try:
            with self._path.open("rb") as file:
                kept = pq.read_table(file)
            for row in kept.to_pylist():
                self._values[row.pop("file")] = row
        except (OSError, pa.ArrowException, KeyError):
            self._values = {}  # absent or damaged: measure again

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
        write_whole(self._path, made.getvalue().to_pybytes())
