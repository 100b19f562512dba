"""Measure recordings: their lengths and the keys of their content, kept between runs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omni.audio.decode import AudioError, AudioSpan, measure
from omni.audio.windows import SAMPLING_RATE
from omni.config.settings import DataConfig
from omni.corpus.content_key import BLOCK_BYTES, key_of, middle_hash, middle_of
from omni.corpus.index_row import span_of
from omni.corpus.measurements import Measurements, measurement_name
from omni.corpus.rejects import Reject
from omni.errors import located
from omni.storage.digest import digest
from omni.storage.path import ObjectPath, StoragePath, literal_path
from omni.storage.retry import retry_storage

_REQUESTS = 32  # concurrent requests to object storage; each mostly waits
_LISTED = 1000  # List a folder once this many of its objects are named.
_PATIENCE_SECONDS = 60.0  # Retry unavailable storage for this long.
_ROUNDING_SECONDS = 0.1  # by which a manifest may be wrong about any recording
DURATION_TOLERANCE = DataConfig().duration_tolerance


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
    known = Measurements(manifest, cache_dir)
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
        self._known = Measurements(Path(), None)

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
    known: Measurements | None = None,
    threads: int = 8,
    tolerance: float = DURATION_TOLERANCE,
) -> list[dict[str, Any] | AudioError]:
    """Measure `samples` and `key` of each row, or return the error that makes it unusable."""
    known = known or Measurements(Path(), None)
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
    row: dict[str, Any], known: Measurements, tolerance: float
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
    row: dict[str, Any], known: Measurements, tolerance: float
) -> dict[str, Any] | AudioError:
    path = literal_path(row["uri"])
    try:
        name, size = measurement_name(row, path, known)
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
        if length <= BLOCK_BYTES:
            return measure_data(file.read_at(length, first), start, duration)
        samples = measure(path, span_of(row))

        def read(at: int, count: int) -> bytes:
            return bytes(file.read_at(count, first + at))

        return {"samples": samples, "key": key_of(read, length, start, duration)}


def measure_data(data: bytes, start: float, duration: float | None) -> dict[str, Any]:
    """Measure `samples` and `key` of an encoded audio file in memory.

    Raises AudioError.
    """
    samples = measure(data, AudioSpan(start, duration))

    def read(at: int, count: int) -> bytes:
        return data[at : at + count]

    return {
        "samples": samples,
        "key": key_of(read, len(data), start, duration, lambda: middle_of(data)),
    }


def _content_key(row: dict[str, Any], size: int, known: Measurements) -> str:
    first, length = (0, size) if row["length"] is None else (row["offset"], row["length"])
    with open(row["uri"], "rb") as file:

        def read(at: int, count: int) -> bytes:
            file.seek(first + at)
            return file.read(count)

        def middle() -> bytes:
            return known.middle((row["uri"], first, length), lambda: middle_hash(read, length))

        return key_of(read, length, row["start"], row["duration"], middle)
