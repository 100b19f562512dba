"""Recordings to 16 kHz mono float32, with one reason for each way a recording can be bad."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
import soundfile
import soxr

from omni.audio.logmel import FRAME, SAMPLING_RATE
from omni.storage.byte_range import ByteRange, ObjectRange, WatchedReader
from omni.storage.path import ObjectPath, StoragePath, literal_path
from omni.storage.retry import retry_storage

_WHOLE_BYTES = 4 << 20  # recordings in archives and buckets up to this size are read at once
_READ_AHEAD = 256 << 10  # bytes of a request for a part of a longer one
Recording: TypeAlias = bytes | str | StoragePath


class AudioError(ValueError):
    """A recording cannot be used. `reason` is one of a few words, fit for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class AudioSpan:
    """Where an utterance lies in its file: `start` and `duration` in seconds, None: to the end.

    bytes: (offset, length) of the recording in an archive that holds more than it.
    """

    start: float = 0.0
    duration: float | None = None
    bytes: tuple[int, int] | None = None


def resampled_length(frames: int, rate: int) -> int:
    """Samples at 16 kHz of `frames` at `rate`."""
    return round(frames * SAMPLING_RATE / rate)


def measure(data: Recording, span: AudioSpan = AudioSpan()) -> int:
    """Samples at 16 kHz that `decode` will return, from the header alone.

    data: a path or plain URI (`omni.storage.path.literal_path`), or the bytes of a file.

    Raises AudioError: `missing`, `unreadable`, `empty`, or `span outside the file`; and OSError for
    object storage that does not answer.
    """
    if isinstance(data, bytes):
        return _measured(io.BytesIO(data), span, "bytes")
    where = _where(data)
    if isinstance(where, Path) and not where.is_file():
        raise AudioError("missing", f"no such file: {data}")
    return _measured(_source(where, span), span, str(where))


def measure_object(
    file: Any, place: tuple[int, int], span: AudioSpan, name: str, known: dict[int, bytes]
) -> int:
    """`measure` of a range of an open object of pyarrow's: (offset, length) in bytes.

    known: bytes of the range that are here already, by their place in it.
    """
    source = WatchedReader(ObjectRange(file, *place, known), max(map(len, known.values())))
    return _measured(source, span, name)


def _measured(source: str | BinaryIO, span: AudioSpan, path: str) -> int:
    try:
        info = soundfile.info(source)
        _check(source)
    except (OSError, soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw
        _check(source)
        raise AudioError("unreadable", f"{path}: {error}") from None
    if info.frames <= 0:
        raise AudioError("empty", f"{path}: no samples")
    first, count = _frames(span, info.frames, info.samplerate, path)
    samples = resampled_length(count, info.samplerate)
    if samples == 0:
        raise AudioError("empty", f"{path}: {count} frames at {info.samplerate} Hz")
    return samples


def decode(data: Recording, span: AudioSpan = AudioSpan()) -> np.ndarray:
    """Decode to (S,) float32 mono at 16 kHz; channels are averaged.

    data: a path or plain URI, or the bytes of a file in any format libsndfile reads.
    Raises AudioError: `unreadable`, `empty`, `not finite`, or `span outside the file`; of an object
    `missing`, and OSError for object storage that does not answer.
    """
    name = "bytes" if isinstance(data, bytes) else str(data)
    source = _source(data, span)
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if file.frames <= 0:
                raise AudioError("empty", f"{name}: no samples")
            first, count = _frames(span, file.frames, rate, name)
            if first:
                file.seek(first)
            samples = file.read(count, dtype="float32", always_2d=True)
        _check(source)
    except (OSError, soundfile.LibsndfileError, TypeError) as error:
        _check(source)
        raise AudioError("unreadable", f"{name}: {error}") from None
    if not len(samples):
        raise AudioError("empty", f"{name}: no samples")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError("not finite", f"{name}: NaN or infinite samples")
    if rate != SAMPLING_RATE:
        mono = soxr.resample(mono, rate, SAMPLING_RATE)
        if not len(mono):
            raise AudioError("empty", f"{name}: {len(samples)} frames at {rate} Hz")
    return np.ascontiguousarray(mono, dtype=np.float32)


def _source(data: Recording, span: AudioSpan) -> str | BinaryIO:
    """What soundfile opens: a file's name, or the bytes of a recording."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    where = _where(data)
    if isinstance(where, ObjectPath):
        return _object(where, span)
    if span.bytes is None:
        return str(where)
    offset, length = span.bytes
    if length > _WHOLE_BYTES:
        return cast(BinaryIO, io.BufferedReader(ByteRange(str(where), offset, length)))
    with open(where, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def _where(data: str | StoragePath) -> StoragePath:
    return literal_path(data) if isinstance(data, str) else data


def _object(path: ObjectPath, span: AudioSpan) -> BinaryIO:
    """A short recording in one request; a long one where it is needed. Raises AudioError."""
    try:
        file = path.ranges()
        size = file.size()
        offset, length = span.bytes or (0, size)
        length = min(length, max(0, size - offset))
        if length > _WHOLE_BYTES:
            return WatchedReader(ObjectRange(file, offset, length), _READ_AHEAD)
        with file:
            return io.BytesIO(file.read_at(length, offset) if length else b"")
    except FileNotFoundError:
        raise AudioError("missing", f"no such object: {path}") from None


def _check(source: object) -> None:
    """Raises the OSError of storage that failed while a recording was being read."""
    if isinstance(source, WatchedReader) and source.failed is not None:
        raise ConnectionError(str(source.failed))


def decode_patiently(path: str | StoragePath, span: AudioSpan = AudioSpan()) -> np.ndarray:
    """`decode`, for a file that was there a while ago: storage that is away is waited for.

    Raises AudioError for a bad file, and OSError when its whole folder or bucket stays away.
    """
    where = _where(path)
    if isinstance(where, ObjectPath):
        return retry_storage(lambda: decode(where, span))

    def attempt() -> np.ndarray:
        try:
            return decode(where, span)
        except AudioError:
            _look_into(where.parent)
        # The folder can be read. It may have come back only now: the second answer counts.
        return decode(where, span)

    return retry_storage(attempt)


def _look_into(folder: Path) -> None:
    """Raises OSError where a folder cannot be read, or is the empty place of a lost mount."""
    with os.scandir(folder) as entries:
        empty = next(entries, None) is None
    if empty:
        raise FileNotFoundError(errno.ENOENT, "the folder is empty", str(folder))


def decode_blocks(
    data: Recording, seconds: float = 30.0, span: AudioSpan = AudioSpan()
) -> Iterator[np.ndarray]:
    """What `decode` returns, to the last bit, in blocks of about `seconds`.

    Memory does not grow with the file. Raises AudioError as `decode` does, where it gets there.
    """
    name = "bytes" if isinstance(data, bytes) else str(data)
    resample: soxr.ResampleStream | None = None
    empty = True
    source = _source(data, span)
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if file.frames <= 0:
                raise AudioError("empty", f"{name}: no samples")
            first, left = _frames(span, file.frames, rate, name)
            if first:
                file.seek(first)
            if rate != SAMPLING_RATE:
                resample = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32")
            while True:
                count = min(left, round(seconds * rate))
                samples = file.read(count, dtype="float32", always_2d=True)
                _check(source)
                left -= len(samples)
                mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
                if not np.isfinite(mono).all():
                    raise AudioError("not finite", f"{name}: NaN or infinite samples")
                last = not len(mono)
                if resample is not None:
                    mono = resample.resample_chunk(np.ascontiguousarray(mono), last=last)
                if len(mono):
                    empty = False
                    yield np.ascontiguousarray(mono, dtype=np.float32)
                if last:
                    break
    except (OSError, soundfile.LibsndfileError, TypeError) as error:
        _check(source)
        raise AudioError("unreadable", f"{name}: {error}") from None
    if empty:
        raise AudioError("empty", f"{name}: no samples")


def fit(audio: np.ndarray, samples: int) -> np.ndarray:
    """Cut or zero-pad to the `samples` that the index measured.

    Resamplers and codec headers disagree by a few samples; more than one encoder frame (20 ms)
    means the file is not what the index saw: AudioError `length mismatch`.
    """
    if abs(len(audio) - samples) > FRAME:
        raise AudioError(
            "length mismatch",
            f"decoded {len(audio) / SAMPLING_RATE:.3f} s, the index reserved "
            f"{samples / SAMPLING_RATE:.3f} s",
        )
    if len(audio) >= samples:
        return audio[:samples]
    return np.pad(audio, (0, samples - len(audio)))


def _frames(span: AudioSpan, total: int, rate: int, name: str) -> tuple[int, int]:
    """The span as (first, count) in frames of the file."""
    first = round(span.start * rate)
    count = total - first if span.duration is None else round(span.duration * rate)
    # A manifest rounds to milliseconds: a span may end that much after the file does.
    slack = rate // 100
    if first < 0 or count <= 0 or first + count > total + slack:
        raise AudioError(
            "span outside the file",
            f"{name}: {span.start} s + {span.duration} s of {total / rate:.3f} s",
        )
    return first, min(count, total - first)
