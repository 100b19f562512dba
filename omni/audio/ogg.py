"""Walk the pages of an Ogg file (RFC 3533): chained streams, missing pages, a cut end."""

from __future__ import annotations

import struct

from omni.audio.link import MISSING, Layout, Link, Window

_HEADER = struct.Struct("<4sBBqIIIB")
_FIRST, _CAPTURE = 2, b"OggS"
_BLOCK = 1 << 20
_LATE = 10 * 48_000  # A first page that ends later belongs to a stream recorded from its middle.


def find_links(window: Window) -> Layout:
    """Split chained streams, each of which begins with a page of its own kind after others."""
    starts: list[int] = []
    audible: list[bool] = []
    sequence: dict[int, int] = {}
    at, headers, estimated, fault = 0, True, False, ""
    block, base = b"", 0
    while at + _HEADER.size <= window.size:
        if not base <= at or at + 65_307 > base + len(block) < window.size:
            block, base = window.read(at, _BLOCK), at
        page = block[at - base : at - base + 27 + 255]
        magic, _, flags, granule, serial, number, _, segments = _HEADER.unpack(page[:27])
        if magic != _CAPTURE:
            estimated = True  # Bytes are missing, or do not belong here.
            found = window.read(at, _BLOCK).find(_CAPTURE, 1)
            if found < 0 and at + _BLOCK >= window.size:
                break
            at += found if found > 0 else _BLOCK - len(_CAPTURE)
            continue
        if flags & _FIRST:
            if not headers or not starts:
                starts.append(at)
                audible.append(False)
                sequence.clear()
            headers = True
        else:
            headers = False
            if number != sequence.get(serial, -1) + 1:
                estimated = True
                fault = f"{MISSING}\npages before number {number}"
            if granule > 0 and starts:
                estimated |= not audible[-1] and granule > _LATE
                audible[-1] = True
        sequence[serial] = number
        at += 27 + segments + sum(page[27 : 27 + segments])
        if at > window.size:
            fault = f"shorter than its header says\nthe last page lacks {at - window.size} bytes"
    ends = [*starts, window.size][1:]
    links = [
        Link(window.offset + start, end - start)
        for start, end, sound in zip(starts, ends, audible, strict=True)
        if sound
    ]
    # Whatever stands before the first stream is left to libsndfile, which takes or refuses it.
    one = len(links) < 2 and len(starts) < 2
    return Layout(() if one else tuple(links), estimated, fault)
