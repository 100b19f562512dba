"""Make the key of a recording's content, under which the cache keeps its features."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from omni.corpus.index_row import span_of
from omni.storage.path import literal_path

BLOCK_BYTES = 4 << 20
"""Bytes read at a time."""
_EDGE = 64 * 1024
"""Bytes hashed at each end of a file."""
_SILENT = 1 / 16
"""Silence compresses below this share; speech in no format does."""


def key_of(
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
    `omni.corpus.measurements`.
    """
    state = hashlib.blake2b(f"{size} {start} {duration}".encode(), digest_size=16)
    last = max(_EDGE, size - _EDGE)
    head, tail = read(0, min(_EDGE, size)), read(last, size - last) if size > last else b""
    state.update(head)
    if last > _EDGE:
        if _is_silent(tail) and _is_silent(head):
            for at in range(_EDGE, last, BLOCK_BYTES):
                state.update(read(at, min(BLOCK_BYTES, last - at)))
        else:
            state.update(middle() if middle else middle_hash(read, size))
    state.update(tail)
    return state.hexdigest()


def middle_hash(read: Callable[[int, int], bytes], size: int) -> bytes:
    """Hash the bytes between both ends of a recording."""
    state = hashlib.blake2b(digest_size=32)
    for at in range(_EDGE, size - _EDGE, BLOCK_BYTES):
        state.update(read(at, min(BLOCK_BYTES, size - _EDGE - at)))
    return state.digest()


@functools.lru_cache(maxsize=1)
def middle_of(data: bytes) -> bytes:
    """Hash the middle of a recording in memory, once for the spans that are cut from it."""
    return middle_hash(lambda at, count: data[at : at + count], len(data))


def _is_silent(data: bytes) -> bool:
    middle = data[len(data) // 2 :][:4096]  # enough to recognise speech quickly
    return all(len(zlib.compress(part, 1)) < _SILENT * len(part) for part in (middle, data))


def whole_key(place: Mapping[str, Any]) -> str:
    """Hash all bytes of a recording; one that cannot be read differs from all others."""
    path, span = literal_path(place["uri"]), span_of(place)
    state = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            first, left = span.bytes or (0, 1 << 62)
            file.seek(first)
            while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
                state.update(block)
                left -= len(block)
    except OSError:
        return str(place["uri"])
    return state.hexdigest()
