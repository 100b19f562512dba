"""Count the frames of an MP3 file, because its header may be missing, or that of its first part.

libsndfile takes the length from a Xing, Info or VBRI header, else guesses it from the bit rate, and
reads no further. So a part of which the guess is too small is given a header.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni.audio.link import Layout, Link, Window

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_KBPS = {  # by (MPEG 1, layer)
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): tuple(range(32, 449, 32)),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_BLOCK = 1 << 20
_SOON, _ENOUGH = 1 << 14, 4  # bytes searched for a first frame, and frames that must follow
_MIDDLE_BITRATE = 9  # 64 kb/s or more: such a frame has room for a header


@dataclass(frozen=True)
class _Frame:
    length: int  # bytes
    stream: tuple[int, int, int, bool]  # version, layer, rate, mono: alike in one stream
    side: int  # bytes of side information

    @property
    def samples(self) -> int:
        version, layer = self.stream[:2]
        return 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576


@dataclass
class _Part:
    """Consecutive frames of one stream. said: frames by its header, None without one."""

    start: int
    end: int
    frames: int
    said: int | None
    stream: tuple[int, int, int, bool]
    head: bytes  # of its first frame

    @property
    def samples(self) -> int:
        """Samples of a frame."""
        frame = _parse(self.head)
        return 0 if frame is None else frame.samples


def is_frame(head: bytes) -> bool:
    """Check whether a file begins with a frame of MPEG audio."""
    return _parse(head) is not None


def begins_soon(window: Window) -> bool:
    """Check whether frames follow the rest of a frame, as in a stream recorded from its middle."""
    start = Window(window.file, window.offset, min(window.size, _SOON))
    at = _resync(start, 0, None)
    for _ in range(_ENOUGH):
        if at is None or (frame := _parse(start.read(at, 4))) is None:
            return False
        at += frame.length
    return True


def find_links(window: Window) -> Layout:
    """Split joined files; give each without a true header one that says how long it is."""
    parts, lost = _walk(window)
    if parts is None:
        return Layout(estimated=True)
    if not lost and len(parts) == 1 and parts[0].said == parts[0].frames:
        return Layout(samples=parts[0].frames * parts[0].samples)
    fault = ""
    links = []
    for part in parts:
        if part.frames == 0:
            continue
        if part.said is not None and part.said > part.frames:
            fault = f"shorter than its header says\n{part.frames} of {part.said} frames are there"
        length = part.end - part.start
        if part.said is None:
            samples = part.frames * part.samples
            link = Link(window.offset + part.start, length, _header(part), samples)
        else:
            samples = part.frames * part.samples
            link = Link(window.offset + part.start, length, samples=samples)
        links.append(link)
    return Layout(tuple(links), estimated=lost > 0 or bool(fault), fault=fault)


def _parse(head: bytes) -> _Frame | None:
    """Read the header of a frame; None where there is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate, padding, mono = (
        head[2] >> 4,
        head[2] >> 2 & 3,
        head[2] >> 1 & 1,
        head[3] >> 6 == 3,
    )
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    hertz = _RATES[version][rate]
    bits = 1000 * _KBPS[version == 3, layer][bitrate - 1]
    if layer == 1:
        length = (12 * bits // hertz + padding) * 4
    else:
        length = (144 if layer == 2 or version == 3 else 72) * bits // hertz + padding
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    return _Frame(length, (version, layer, hertz, mono), side)


def _walk(window: Window) -> tuple[list[_Part] | None, int]:
    """Walk over all frames; return the parts, and the bytes between frames that belong to none.

    None instead of parts: no walk is possible (a free bit rate, a single frame).
    """
    parts: list[_Part] = []
    at, lost, block, base = 0, 0, b"", 0
    while at + 4 <= window.size:
        if not base <= at or at + 4096 > base + len(block) < window.size:
            block, base = window.read(at, _BLOCK), at
        inside = at - base
        head = block[inside : inside + 4]
        frame = _parse(head)
        if frame is None:
            if head[:3] == b"TAG" or block[inside : inside + 8] == b"APETAGEX":
                rest = window.size - at
                if rest <= 128 or head[:3] != b"TAG":
                    break
                at += 128
                continue
            if head[:3] == b"ID3":
                size = block[inside + 6 : inside + 10]
                if len(size) == 4:
                    at += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
                    continue
            skipped = _resync(window, at, parts[-1].stream if parts else None)
            if skipped is None:
                lost += 0 if not any(window.read(at, 4096)) else window.size - at
                break
            lost += skipped
            at += skipped
            continue
        if at + frame.length > window.size:
            lost += window.size - at  # the last frame is cut
            break
        said = _said(block[inside : inside + 4096], frame)
        part = parts[-1] if parts else None
        over = part is not None and part.said is not None and part.frames == part.said
        if part is None or said is not None or part.stream != frame.stream or over:
            unknown = said == 0  # Its header is of no use, and would be heard as silence.
            part = _Part(
                at + frame.length if unknown else at, at, 0, said or None, frame.stream, head
            )
            parts.append(part)
        if said is None:
            part.frames += 1
        at += frame.length
        part.end = at
    return (parts or None), lost


def _resync(window: Window, at: int, stream: tuple[int, int, int, bool] | None) -> int | None:
    """Count the bytes to the next frame that is followed by another of its stream."""
    start = at
    while at < window.size:
        block = window.read(at, _BLOCK)
        found = 0 if at == start else -1
        while (found := block.find(b"\xff", found + 1)) >= 0:
            frame = _parse(block[found : found + 4])
            if frame is None or (stream is not None and frame.stream[:3] != stream[:3]):
                continue
            following = _parse(window.read(at + found + frame.length, 4))
            if following is not None and following.stream[:3] == frame.stream[:3]:
                return at + found - start
        at += max(1, len(block) - 4)
    return None


def _said(data: bytes, frame: _Frame) -> int | None:
    """Return the number of frames by a Xing, Info or VBRI header; None: this frame is audio."""
    at = 4 + frame.side
    if data[at : at + 4] in (b"Xing", b"Info"):
        if data[at + 7] & 1:
            return int.from_bytes(data[at + 8 : at + 12], "big")
        return 0
    if data[36:40] == b"VBRI":
        return int.from_bytes(data[50:54], "big")
    return None


def _header(part: _Part) -> bytes:
    """Make a frame with a Xing header that says how many frames follow."""
    head = bytearray(part.head)
    head[1] |= 1  # no checksum
    head[2] = _MIDDLE_BITRATE << 4 | head[2] & 0x0C
    frame = _parse(bytes(head))
    assert frame is not None
    data = bytearray(frame.length)
    at = 4 + frame.side
    size = part.end - part.start + frame.length
    data[:4] = head
    data[at : at + 16] = b"Xing\0\0\0\3" + part.frames.to_bytes(4, "big") + size.to_bytes(4, "big")
    return bytes(data)
