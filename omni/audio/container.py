"""Find what a file really holds from its structure, because headers can be wrong.

A recording is one or more links, each of which libsndfile decodes as a file of its own: chained Ogg
and joined MP3, FLAC and WAV files have several, and a header whose sizes were never filled in is
replaced. Only bytes are looked at here; nothing is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import IO

from omni.audio import flac, mpeg, ogg
from omni.audio.link import Layout, Link, Window

SHORTER = "shorter than its header says"
LONGER = "longer than its header says"
_STREAMED = 0x7FFF_F000  # Sizes from here on, and 0, are placeholders of a writer that cannot seek.
_SLACK = 1024  # bytes by which sizes of other containers may be wrong
_UNEXPLAINED_SECONDS = 0.5  # Shorter data behind a recording is a trailer.
_CUT_SECONDS = 0.02  # one encoder frame
_SEARCHED = 1 << 20  # bytes
_NEXT_WAV = re.compile(rb"RIFF....WAVEfmt ", re.DOTALL)


def find_layout(file: IO[bytes], size: int) -> Layout:
    """Find the links of a recording of `size` bytes; a format unknown here is one link as it is."""
    window = Window(file, 0, size)
    head = window.read(0, 12)
    skipped = _id3_length(window) if head[:3] == b"ID3" else 0
    inner = Window(file, skipped, size - skipped) if skipped else window
    head = inner.read(0, 12)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        return _wav(inner)
    if head[:4] == b"fLaC":
        return flac.find_links(inner)
    if head[:4] == b"OggS":
        return ogg.find_links(inner)
    if mpeg.is_frame(head):
        return mpeg.find_links(inner)
    for magic, declared_end in _DECLARED_ENDS.items():
        if head.startswith(magic):
            end = declared_end(inner)
            cut = end is not None and end > inner.size + _SLACK
            return Layout(fault=f"{SHORTER}\n{_short(end, inner.size)}" if cut and end else "")
    if head[:4] == b"caff":
        return _caf(inner)
    if mpeg.begins_soon(inner):
        return mpeg.find_links(inner)
    return Layout()


def streamed_wav_length(
    file: IO[bytes], offset: int, total: int, keys: Collection[str] = ()
) -> int | None:
    """Return the length in bytes of a WAV file with unknown sizes inside an archive of Kaldi.

    offset: its first byte. It ends before the key of the next WAV file, or with the archive. None:
    its sizes are known. keys: those of the archive, as far as they are known; where the next one is
    not among them, some bytes of audio may be taken for it.
    """
    window = Window(file, offset, total - offset)
    said = int.from_bytes(window.read(4, 4), "little")
    if 0 < said < _STREAMED:
        return None
    if (following := _next_wav(window, 12)) is None:
        return window.size
    # An entry is KEY, a blank, and the file; keys are words of at most some hundred characters.
    before = window.read(max(0, following - 512), min(512, following))
    if not before.endswith(b" "):
        return following
    known = [key for key in keys if before[:-1].endswith(key.encode())]
    if known:
        return following - len(max(known, key=len).encode()) - 1
    key = re.search(rb"[!-~\x80-\xff]+ $", before)
    return following - (len(key[0]) if key else 1)


def _id3_length(window: Window) -> int:
    """Return the length of an ID3v2 tag at the beginning."""
    head = window.read(0, 10)
    if len(head) < 10 or any(byte & 0x80 for byte in head[6:]):
        return 0
    length = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0)))  # noqa: B905 (both are four)
    return length if length < window.size else 0


def _short(said: int, there: int) -> str:
    return f"{there} of {said} bytes are there"


def _wav(window: Window) -> Layout:
    """Check the sizes of a WAV file; replace a header without them; go on with a joined file."""
    order = "big" if window.read(0, 4) == b"RIFX" else "little"

    def number(at: int, count: int = 4) -> int:
        return int.from_bytes(window.read(at, count), order)  # type: ignore[arg-type]

    at, rate, long_size = 12, 0, 0
    while at + 8 <= window.size and (name := window.read(at, 4)) != b"data":
        length = number(at + 4)
        if name == b"fmt ":
            rate = number(at + 16)  # bytes per second
        elif name == b"ds64":
            long_size = number(at + 16, 8)
        at += 8 + length + length % 2
    start = at + 8
    if start > window.size or window.read(at, 4) != b"data":
        return Layout()  # libsndfile says what is wrong.
    said, there = number(at + 4), window.size - start
    if window.read(0, 4) == b"RF64" and said == 0xFFFF_FFFF:
        said = long_size
    unset = said == 0 and there > 0 and not _are_chunks(window, start)
    if unset or (said >= _STREAMED and said > there):
        following = _next_wav(window, start)
        length = (window.size if following is None else following) - start
        if order == "big" or length >= 1 << 32:
            return Layout(fault=f"{LONGER}\n{length} bytes behind a header without sizes")
        header = bytearray(window.read(0, start))
        header[:4], header[4:8] = (
            b"RIFF",
            min(start - 8 + length, 0xFFFF_FFFF).to_bytes(4, "little"),
        )
        header[at + 4 : at + 8] = length.to_bytes(4, "little")
        if header[12:16] == b"ds64":
            header[12:16] = b"junk"
        links = (Link(window.offset + start, length, bytes(header)),)
        return _joined(window, links, start + length)
    if said > there:
        cut = said - there > max(1, rate * _CUT_SECONDS)
        return Layout(fault=f"{SHORTER}\n{_short(said, there)}" if cut else "")
    end = start + said
    if window.read(end + said % 2, 4) in (b"RIFF", b"RF64") and window.size > end + 44:
        links = (Link(window.offset, end),)
        return _joined(window, links, end + said % 2)
    left = window.size - end
    if left > max(rate * _UNEXPLAINED_SECONDS, 64) and not _are_chunks(window, end + said % 2):
        return Layout(fault=f"{LONGER}\n{left} bytes follow its {said} bytes of audio")
    return Layout()


def _joined(window: Window, links: tuple[Link, ...], end: int) -> Layout:
    """Add the links of what follows a WAV file at `end`."""
    if end + 44 > window.size:
        return Layout(links)
    rest = Window(window.file, window.offset + end, window.size - end)
    more = _wav(rest)
    return replace(more, links=links + (more.links or (Link(rest.offset, rest.size),)))


def _next_wav(window: Window, at: int) -> int | None:
    """Find the next WAV file from byte `at` on."""
    while at < window.size:
        block = window.read(at, _SEARCHED)
        if found := _NEXT_WAV.search(block):
            return at + found.start()
        if at + len(block) >= window.size:
            break
        at += max(1, len(block) - 16)
    return None


def _are_chunks(window: Window, at: int) -> bool:
    """Check whether all from `at` on is chunks with names and sizes, or zeros, or a tag."""
    for _ in range(1000):
        head = window.read(at, 8)
        if len(head) < 8 or head[:3] in (b"TAG", b"ID3") or head == b"APETAGEX":
            return True
        if not any(head):
            return not any(window.read(at, window.size - at).strip(b"\0"))
        if not re.fullmatch(rb"[ -~]{4}", head[:4]):
            return False
        at += 8 + int.from_bytes(head[4:], "little")
        at += at % 2
        if at > window.size + 1:
            return False
    return True


def _form_end(window: Window) -> int | None:
    said = int.from_bytes(window.read(4, 4), "big")
    return None if said == 0 or said >= _STREAMED else said + 8


def _au_end(window: Window) -> int | None:
    order = "big" if window.read(0, 4) == b".snd" else "little"
    start, said = (int.from_bytes(window.read(at, 4), order) for at in (4, 8))  # type: ignore[arg-type]
    return None if said == 0 or said >= _STREAMED else start + said


def _w64_end(window: Window) -> int | None:
    said = int.from_bytes(window.read(16, 8), "little")
    return None if said == 0 or said >= 1 << 62 else said


def _sphere_end(window: Window) -> int | None:
    """Compute the end of a NIST SPHERE file from the text of its header."""
    text = window.read(0, 4096)
    start = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", text)
    found = {
        name: int(value)
        for name, value in re.findall(rb"\n(\w+) -i (\d{1,15})\b", text.partition(b"end_head")[0])
    }
    if not start or b"shorten" in text:
        return None
    size = found.get(b"sample_n_bytes", 0) * found.get(b"channel_count", 1)
    return int(start[1]) + found.get(b"sample_count", 0) * size


_DECLARED_ENDS: dict[bytes, Callable[[Window], int | None]] = {
    b"FORM": _form_end,
    b".snd": _au_end,
    b"dns.": _au_end,
    b"riff\x2e\x91\xcf\x11": _w64_end,
    b"NIST_1A": _sphere_end,
}


def _caf(window: Window) -> Layout:
    """Check the size of the data chunk of a CAF file; -1 means to the end of the file."""
    at = 8
    while at + 12 <= window.size:
        name = window.read(at, 4)
        length = int.from_bytes(window.read(at + 4, 8), "big", signed=True)
        there = window.size - at - 12
        if name == b"data":
            if length == -1:
                start = at + 12
                header = window.read(0, at + 4) + there.to_bytes(8, "big")
                return Layout((Link(window.offset + start, there, header),))
            return Layout(fault=f"{SHORTER}\n{_short(length, there)}" if length > there else "")
        if length < 0:
            break
        at += 12 + length
    return Layout()
