"""Decode with PyAV (FFmpeg) what libsndfile cannot read, where PyAV is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from omni.audio.formats import has_av

# Containers of audio alone. Playlists and others that name further files or hosts are not opened.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,asf,amr,amrnb,amrwb,ac3,eac3,mp3,ape,wv,tta,ogg,dsf,"
    "mpegts,flv,avi,wav,w64,aiff,caf,au,nistsphere,flac,loas,truehd,dts,gsm,mpeg"
)


def errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of PyAV for a file that it cannot read; none where it is missing."""
    if not has_av():
        return ()
    import av

    return (av.FFmpegError, NoAudio)


class NoAudio(Exception):
    """The file has no track of audio that can be decoded."""


class _Quiet:
    """A file whose failing seeks give FFmpeg an error code; PyAV would print exceptions."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -1

    def tell(self) -> int:
        return self._file.tell()


class AVStream:
    """Samples of the first track of audio. Its length is known once it has been decoded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._container = self._open()
        track = self._track(self._container)
        self.rate = int(track.rate or 0)
        self.channels = int(track.channels or 0)
        self.frames: int | None = None
        seconds = (self._container.duration or 0) / 1e6
        self.stated = round(seconds * self.rate)
        if not self.rate or not self.channels:
            self.close()
            raise NoAudio("the rate of its audio is unknown")

    def blocks(self, first: int, count: int | None, most: int) -> Iterator[np.ndarray]:
        """See `omni.audio.recording.Stream`; it is always decoded from its beginning."""
        if self._container is None:
            self._file.seek(0)
            self._container = self._open()
        container, self._container = self._container, None
        with container:
            for frame in container.decode(self._track(container)):
                if frame.sample_rate != self.rate or frame.layout.nb_channels != self.channels:
                    raise NoAudio(
                        f"its audio changes from {self.channels} channels at {self.rate} Hz to "
                        f"{frame.layout.nb_channels} at {frame.sample_rate} Hz"
                    )
                block = _samples(frame)[first:]
                first = max(0, first - frame.samples)
                if count is not None:
                    block = block[:count]
                    count -= len(block)
                for at in range(0, len(block), most):
                    yield block[at : at + most]
                if count == 0:
                    break

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> Any:
        import av

        av.logging.set_level(None)
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
        return av.open(_Quiet(self._file), options=options)

    @staticmethod
    def _track(container: Any) -> Any:
        if not container.streams.audio:
            raise NoAudio("it has no audio")
        track = container.streams.audio[0]
        if track.codec_context is None:
            raise NoAudio("no decoder for its audio")
        return track


def _samples(frame: Any) -> np.ndarray:
    """Convert a frame to (S, channels) float32 in [-1, 1]."""
    values: np.ndarray = frame.to_ndarray()
    planar = frame.format.is_planar
    by_sample = values.T if planar else values.reshape(-1, frame.layout.nb_channels)
    kind = frame.format.name.removesuffix("p")
    if kind == "u8":
        return (by_sample.astype(np.float32) - 128.0) / 128.0
    scale = {"s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}.get(kind, 1.0)
    return np.ascontiguousarray(by_sample / scale, dtype=np.float32)
