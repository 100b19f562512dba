"""Check the length of a FLAC file by its last frame, and find files that were joined."""

from __future__ import annotations

import re
from typing import IO

from omni.audio.link import Layout, Link, Window

_TAIL = 1 << 17  # bytes in which the last frame begins
_BLOCK = 4 << 20
_LAST_FRAMES = 3
_INFO_END = 42  # bytes of the mark and the stream information
_JOINED = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_SIZES = {1: 192, **{n: 144 << n for n in range(2, 6)}, **{n: 1 << n for n in range(8, 16)}}
"""Samples of a frame by its code."""


def find_links(window: Window) -> Layout:
    """Find the links of a FLAC file.

    Its header has 0 samples when it was written to a pipe, and libsndfile reads no further than it
    says. The last frame says where the file ends: a header that says less is replaced by one with
    0 samples, and one that says more is evidence that the end is missing.
    """
    starts = _starts(window)
    links = []
    fault = ""
    for start, end in zip(starts, [*starts[1:], window.size], strict=True):
        link = Link(window.offset + start, end - start)
        said, ends = _ends(Window(window.file, link.offset, link.length))
        end = max(ends, default=0)
        if said and said not in ends and end > said:
            link = _without_length(window.file, link)
        elif said and said not in ends:
            fault = f"shorter than its header says\n{end} of {said} samples"
        links.append(link)
    whole = len(links) == 1 and not links[0].head
    return Layout(() if whole else tuple(links), fault=fault)


def _without_length(file: IO[bytes], link: Link) -> Link:
    """Replace the number of samples in the header by 0."""
    head = bytearray(Window(file, link.offset, link.length).read(0, _INFO_END))
    if len(head) < _INFO_END:
        return link
    head[21] &= 0xF0
    head[22:26] = bytes(4)
    return Link(link.offset + _INFO_END, link.length - _INFO_END, bytes(head))


def _starts(window: Window) -> list[int]:
    """Find the first byte of each file."""
    starts, at = [0], 4
    while at < window.size:
        block = window.read(at, _BLOCK)
        starts += [at + found.start() for found in _JOINED.finditer(block)]
        if at + len(block) >= window.size:
            break
        at += max(1, len(block) - 7)
    return sorted(set(starts))


def _ends(window: Window) -> tuple[int, list[int]]:
    """Return the number of samples in the header, and those at the ends of the last frames.

    By chance, audio may look like a frame, so that there may be ends that are none.
    """
    info = window.read(8, 34)
    if len(info) < 34:
        return 0, []
    smallest, largest = (int.from_bytes(info[at : at + 2], "big") for at in (0, 2))
    said = int.from_bytes(info[13:18], "big") & 0xF_FFFF_FFFF
    tail = window.read(max(0, window.size - _TAIL), _TAIL)
    fixed = largest if smallest == largest else 0
    ends: list[int] = []
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0 and len(ends) < _LAST_FRAMES:
        if (end := _frame_end(tail[at : at + 16], fixed)) is not None:
            ends.append(end)
    return said, ends


def _frame_end(head: bytes, fixed: int) -> int | None:
    """Return the number of the sample behind a frame; None where no valid header stands.

    fixed: samples of every frame but the last, 0 where they vary.
    """
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    number, used = _coded_number(head[4:])
    if number is None:
        return None
    at = 4 + used
    code, rate = head[2] >> 4, head[2] & 0xF
    if code == 0 or rate == 15:
        return None
    if code in (6, 7):
        count = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        count = _SIZES[code]
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    variable = head[1] & 1
    return (number if variable else number * (fixed or count)) + count


def _coded_number(data: bytes) -> tuple[int | None, int]:
    """Read a number coded as in UTF-8, of up to 7 bytes; return it and its bytes."""
    lead = data[0]
    count = next((n for n in range(8) if not lead & 0x80 >> n), 8)
    if count == 0:
        return lead, 1
    if count in (1, 8) or len(data) < count or any(b & 0xC0 != 0x80 for b in data[1:count]):
        return None, 0
    value = lead & (0x7F >> count)
    for byte in data[1:count]:
        value = value << 6 | byte & 0x3F
    return value, count


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value
