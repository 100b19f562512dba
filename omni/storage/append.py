"""Append to files in object storage, whose objects cannot grow, by segments.

    metrics.jsonl  metrics.jsonl.1  metrics.jsonl.2

Each append rewrites the last segment from memory until it holds 1 MiB; then a new one begins. One
process writes a file at a time; readers see whole appends only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from omni.storage.path import ObjectPath

SEGMENT_BYTES = 1 << 20


@dataclass
class _Last:
    number: int
    data: bytes


_last: dict[ObjectPath, _Last] = {}
_failed: dict[ObjectPath, _Last] = {}
"""Segments whose write failed; they may have arrived though the answer did not."""
_lock = threading.Lock()


def append(path: ObjectPath, data: bytes) -> None:
    """Append `data`. Raises OSError: the same call again then appends it once."""
    with _lock:
        last = _last.get(path)
        if last is None or _size(segment(path, last.number)) != len(last.data):
            last = _find(path)  # Another process has appended since.
        failed = _failed.get(path)
        if failed is not None and failed.data.endswith(data) and _arrived(path, failed):
            longer = failed
        else:
            longer = _Last(last.number, last.data + data)
            _last.pop(path, None)
            _failed[path] = longer
            segment(path, longer.number).write_bytes(longer.data)
        _failed.pop(path, None)
        if len(longer.data) < SEGMENT_BYTES:
            _last[path] = longer


def replace(path: ObjectPath, data: bytes) -> None:
    """Replace the content by `data`; an interruption leaves old segments behind the new one."""
    with _lock:
        _forget(path)
        path.write_bytes(data)
        _remove(path, 1)


def remove(path: ObjectPath) -> None:
    """Remove all segments; nothing if there are none."""
    with _lock:
        _forget(path)
        _remove(path, 0)


def segments(path: ObjectPath) -> Iterator[ObjectPath]:
    """Those that are there, in order."""
    number = 0
    while (part := segment(path, number)).is_file():
        yield part
        number += 1


def segment(path: ObjectPath, number: int) -> ObjectPath:
    """The name of the part with a number, from 0."""
    return path.with_name(f"{path.name}.{number}") if number else path


def read(path: ObjectPath) -> Iterator[bytes]:
    """Lines, with their ends; nothing where there is no such file."""
    for part in segments(path):
        yield from part.read_bytes().splitlines(keepends=True)


def _forget(path: ObjectPath) -> None:
    _last.pop(path, None)
    _failed.pop(path, None)


def _arrived(path: ObjectPath, failed: _Last) -> bool:
    part = segment(path, failed.number)
    return _size(part) == len(failed.data) and part.read_bytes() == failed.data


def _size(path: ObjectPath) -> int | None:
    size: int | None = path.info().size
    return size


def _find(path: ObjectPath) -> _Last:
    number = len(list(segments(path))) - 1
    if number < 0:
        return _Last(0, b"")
    full = (_size(segment(path, number)) or 0) >= SEGMENT_BYTES
    return _Last(number + 1, b"") if full else _Last(number, segment(path, number).read_bytes())


def _remove(path: ObjectPath, first: int) -> None:
    """Remove segments from the last one down, so that those left are a beginning."""
    for part in reversed(list(segments(path))[first:]):
        part.unlink(missing_ok=True)
