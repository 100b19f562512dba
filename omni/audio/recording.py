"""Open a recording as streams of samples, whatever library decodes it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Protocol, TypeAlias, cast

import numpy as np
import soundfile

from omni.audio import av_stream
from omni.audio.container import SHORTER, find_layout
from omni.audio.formats import AV_ENDINGS, INSTALL_AV, has_av
from omni.audio.link import Layout, Link
from omni.errors import first_line
from omni.storage.byte_range import ByteRange, HeadedRange, ObjectRange, WatchedReader
from omni.storage.path import ObjectPath, StoragePath, literal_path

MAX_WHOLE = 4 << 20
"""Larger recordings in archives and buckets, in bytes, are read in parts."""
_READ_AHEAD = 256 << 10  # bytes of a request for such a part
_BLOCK_VALUES = 1 << 20  # samples of all channels that are decoded at a time: 4 MB
_RATES = (1_000, 384_000)  # Hz
_MAX_VALUES = 8 * 192_000  # samples of all channels per second
_STATED_SLACK = 0.02  # share by which containers may be wrong
_MP3_TRIM = 2_304  # samples of delay and padding that MP3 decoders cut below 12 kHz
_UNKNOWN = 1 << 40  # libsndfile's frames from here on mean that it does not know


@dataclass(frozen=True)
class FetchedRecording:
    """Bytes of a recording, and its name for messages."""

    name: str
    data: bytes


RecordingData: TypeAlias = bytes | FetchedRecording | str | StoragePath


class AudioError(ValueError):
    """A recording cannot be used. `reason` is one of a few fixed phrases, to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class AudioSpan:
    """Position of an utterance in its file."""

    start: float = 0.0
    """In seconds."""
    duration: float | None = None
    """In seconds; None: to the end."""
    bytes: tuple[int, int] | None = None
    """(offset, length) of the recording in an archive."""


class Stream(Protocol):
    """Consecutive samples of one rate. frames: None where only decoding tells their number."""

    rate: int
    channels: int
    frames: int | None
    stated: int
    """Samples by the header of a container that is decoded to know; 0 where it says nothing."""

    def blocks(self, first: int, count: int | None, most: int) -> Iterator[np.ndarray]:
        """Yield `count` samples from `first` on (None: to the end) as (S, channels) float32.

        most: largest S, a bound of the memory beside the decoder's own.
        """
        ...


class OpenRecording:
    """Streams of a recording, one after another. A context manager: it closes its files.

    Raises AudioError when it is opened or read: `missing` (an object), `unreadable`, `empty`,
    `implausible header`; and OSError when object storage is unavailable.
    """

    def __init__(self, data: RecordingData, span: AudioSpan) -> None:
        self.name = _name_of(data)
        self._closing = ExitStack()
        try:
            self._source = _open_source(data, span)
            with self.reading():
                self._file = self._raw_file()
                self.layout = _layout_of(self._file, self._identity(data, span))
                self.streams = self._open_streams()
        except BaseException:
            self._closing.close()
            raise
        for stream in self.streams:
            total = stream.rate * stream.channels
            if not _RATES[0] <= stream.rate <= _RATES[1] or total > _MAX_VALUES:
                self._closing.close()
                detail = f"{stream.channels} channels at {stream.rate} Hz"
                raise AudioError("implausible header", f"{self.name}: {detail}")

    def __enter__(self) -> OpenRecording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of decoding into AudioError, and of object storage into OSError."""
        try:
            yield
        except Exception as error:
            _raise_storage_error(self)
            if isinstance(error, (AudioError, MemoryError, ConnectionError)):
                raise
            # Whatever a decoder raises for a damaged file: the recording is named and left out.
            known = (OSError, EOFError, soundfile.LibsndfileError, *av_stream.errors())
            kind = "" if isinstance(error, known) else f"{type(error).__name__}: "
            detail = f"{self.name}: {kind}{_reason(error)}"
            raise AudioError("unreadable", detail) from None
        _raise_storage_error(self)

    @property
    def storage_error(self) -> OSError | None:
        """Return why object storage gave nothing: decoders take that for the end of the file."""
        source = getattr(self, "_source", None)
        return source.failed if isinstance(source, WatchedReader) else None

    def frames(self, stream: Stream) -> int:
        """Return the number of samples of a stream; decode it where its header does not tell."""
        if stream.frames is None:
            with self.reading():
                stream.frames = sum(len(block) for block in stream.blocks(0, None, _BLOCK_VALUES))
        return stream.frames

    @property
    def fault(self) -> str:
        """Return the evidence that the file is not whole: reason and detail, on a line each."""
        for stream in self.streams:
            frames = self.frames(stream)
            stated = stream.stated or self.layout.samples
            if stated * (1 - _STATED_SLACK) - max(stream.rate // 5, _MP3_TRIM) > frames:
                return f"{SHORTER}\n{frames} of {stated} samples are there"
        return self.layout.fault

    def _raw_file(self) -> BinaryIO:
        source = self._source
        file = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115
        self._closing.callback(file.close)
        return file

    def _identity(self, data: RecordingData, span: AudioSpan) -> tuple[object, ...] | None:
        """Return what changes when the bytes do; None for bytes in memory."""
        if isinstance(self._source, io.BytesIO):
            return None
        if isinstance(self._source, WatchedReader):
            return self.name, span.bytes, self._source.raw.size
        status = os.stat(self.name)
        return self.name, span.bytes, status.st_size, status.st_mtime_ns

    def _open_streams(self) -> list[Stream]:
        links, estimated = self.layout.links, self.layout.estimated
        try:
            if not links:
                return [self._sound_stream(self._source, estimated)]
            return [self._link_stream(link, estimated) for link in links]
        except soundfile.LibsndfileError as error:
            if self.storage_error is not None:
                raise
            return [self._av_stream(error)]

    def _sound_stream(self, source: str | BinaryIO, estimated: bool) -> Stream:
        def open_file() -> _ForwardFile:
            if not isinstance(source, str):
                source.seek(0)
            file = _ForwardFile(source)
            self._closing.callback(file.close)
            return file

        return _SoundStream(open_file, estimated)

    def _link_stream(self, link: Link, estimated: bool) -> Stream:
        stream: Stream
        if link.head and link.samples is not None:
            bare = self._sound_stream(self._link_file(link, b""), estimated)
            if (bare.frames or 0) >= link.samples:
                bare.frames = None  # More than there are, perhaps: decoding tells.
                return bare
        stream = self._sound_stream(self._link_file(link, link.head), estimated)
        stream.stated = link.samples or 0
        return stream

    def _link_file(self, link: Link, head: bytes) -> BinaryIO:
        ranged = HeadedRange(self._file, link.offset, link.length, head)
        return cast(BinaryIO, io.BufferedReader(ranged))

    def _av_stream(self, error: Exception) -> Stream:
        """Open what libsndfile cannot with PyAV, where that is installed."""
        if not has_av():
            ending = self.name.rpartition(".")[2].lower()
            advice = f" ({INSTALL_AV} reads .{ending})" if ending in AV_ENDINGS else ""
            raise AudioError("unreadable", f"{self.name}: {_reason(error)}{advice}") from None
        self._file.seek(0)
        try:
            stream = av_stream.AVStream(self._file)
        except av_stream.errors() as other:
            detail = f"{self.name}: {_reason(error)}; PyAV: {_reason(other)}"
            raise AudioError("unreadable", detail) from None
        self._closing.callback(stream.close)
        return stream


def _raise_storage_error(recording: OpenRecording) -> None:
    """Raise ConnectionError if object storage failed while the recording was read."""
    if (failed := recording.storage_error) is not None:
        raise ConnectionError(str(failed))


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read forwards.

    soundfile seeks to its position after every read, which makes libsndfile begin anew in the
    middle of MP3 frames, and fails in FLAC files of unknown length.
    """

    def seekable(self) -> bool:
        return False


class _SoundStream:
    """Samples of a file that libsndfile reads.

    open_file: opens it anew, because a FLAC file of unknown length cannot go back.
    """

    def __init__(self, open_file: Callable[[], _ForwardFile], estimated: bool) -> None:
        self._open_file = open_file
        self._file: _ForwardFile | None = open_file()
        self.rate, self.channels = int(self._file.samplerate), int(self._file.channels)
        known = not estimated and self._file.frames < _UNKNOWN
        self.frames: int | None = max(0, int(self._file.frames)) if known else None
        self._can_seek = known
        self.stated = 0

    def blocks(self, first: int, count: int | None, most: int) -> Iterator[np.ndarray]:
        file, self._file = self._file or self._open_file(), None
        most = max(1, min(most, _BLOCK_VALUES // self.channels))
        if first and self._can_seek:
            file.seek(first)
        else:
            for skipped in _steps(first, most):
                file.read(skipped, dtype="float32", always_2d=True)
        got = 0
        for wanted in _steps(count, most):
            block = file.read(wanted, dtype="float32", always_2d=True)
            if not len(block):
                break
            got += len(block)
            yield block
        if count is not None and got < count - self.rate // 50:  # 20 ms, as in `fit`
            raise EOFError(f"decoding ended after {got} of {count} samples")


def _steps(count: int | None, most: int) -> Iterator[int]:
    """Yield numbers up to `most` whose sum is `count`; without end where it is None."""
    while count is None or count > 0:
        step = most if count is None else min(count, most)
        yield step
        count = None if count is None else count - step


def _layout_of(file: BinaryIO, identity: tuple[object, ...] | None) -> Layout:
    """Find the layout of a recording, once for the many spans of a long one."""
    if identity in _LAYOUTS:
        return _LAYOUTS[identity]
    size = file.seek(0, io.SEEK_END)
    layout = find_layout(file, size)
    if identity is not None and size > MAX_WHOLE:
        if len(_LAYOUTS) >= _MOST_LAYOUTS:
            _LAYOUTS.clear()
        _LAYOUTS[identity] = layout
    return layout


_LAYOUTS: dict[tuple[object, ...] | None, Layout] = {}
_MOST_LAYOUTS = 10_000


def _name_of(data: RecordingData) -> str:
    if isinstance(data, bytes):
        return "bytes"
    return data.name if isinstance(data, FetchedRecording) else str(data)


def _open_source(data: RecordingData, span: AudioSpan) -> str | BinaryIO:
    """Return what soundfile can open: a file name, or a file object of the recording's bytes."""
    if isinstance(data, FetchedRecording):
        data = data.data
    if isinstance(data, bytes):
        return io.BytesIO(data)
    path = as_recording_path(data)
    if isinstance(path, ObjectPath):
        return _open_object(path, span)
    if span.bytes is None:
        return str(path)
    offset, length = span.bytes
    if length > MAX_WHOLE:
        return cast(BinaryIO, io.BufferedReader(ByteRange(str(path), offset, length)))
    with open(path, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def as_recording_path(data: str | StoragePath) -> StoragePath:
    return literal_path(data) if isinstance(data, str) else data


def _open_object(path: ObjectPath, span: AudioSpan) -> BinaryIO:
    """Read a short recording in one request; read a long one on demand. Raises AudioError."""
    try:
        file = path.ranges()
        size = file.size()
        offset, length = span.bytes or (0, size)
        length = min(length, max(0, size - offset))
        if length > MAX_WHOLE:
            return WatchedReader(ObjectRange(file, offset, length), _READ_AHEAD)
        with file:
            return io.BytesIO(file.read_at(length, offset) if length else b"")
    except FileNotFoundError:
        raise AudioError("missing", f"no such object: {path}") from None


def _reason(error: Exception) -> str:
    """Return why a decoder failed, without its name of a file in memory."""
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string)
    return first_line(error).removesuffix(": '<none>'")
