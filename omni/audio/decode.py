"""Decode recordings to 16 kHz mono float32; each kind of bad recording has one reason."""

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

_MAX_WHOLE = 4 << 20  # Larger recordings in archives and buckets, in bytes, are read in parts.
_READ_AHEAD = 256 << 10  # bytes of a request for such a part
Recording: TypeAlias = bytes | str | StoragePath


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


def resampled_length(frames: int, rate: int) -> int:
    """Convert a number of samples at `rate` to the number at 16 kHz."""
    return round(frames * SAMPLING_RATE / rate)


def measure(data: Recording, span: AudioSpan = AudioSpan()) -> int:
    """Read only the header and return the number of samples that `decode` will return.

    data: a path or plain URI (`omni.storage.path.literal_path`), or the bytes of a file.

    Raises AudioError: `missing`, `unreadable`, `empty`, or `span outside the file`; and OSError
    when object storage is unavailable.
    """
    if isinstance(data, bytes):
        return _measure_source(io.BytesIO(data), span, "bytes")
    path = _as_path(data)
    if isinstance(path, Path) and not path.is_file():
        raise AudioError("missing", f"no such file: {data}")
    return _measure_source(_open_source(path, span), span, str(path))


def measure_object(
    file: Any, extent: tuple[int, int], span: AudioSpan, name: str, known: dict[int, bytes]
) -> int:
    """Measure a recording in a range of an open pyarrow file, as `measure`.

    extent: (offset, length) of the range in bytes. known: parts of it that have been read already,
    by their offset in it.
    """
    source = WatchedReader(ObjectRange(file, *extent, known), max(map(len, known.values())))
    return _measure_source(source, span, name)


def _measure_source(source: str | BinaryIO, span: AudioSpan, path: str) -> int:
    try:
        info = soundfile.info(source)
        _raise_storage_error(source)
    except (OSError, soundfile.LibsndfileError, TypeError) as error:
        # soundfile raises TypeError for headerless .raw files.
        _raise_storage_error(source)
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

    data: a path or plain URI, or the bytes of a file in any format that libsndfile reads.
    Raises AudioError: `unreadable`, `empty`, `not finite`, `span outside the file`, or `missing`
    for an object; and OSError when object storage is unavailable.
    """
    name = "bytes" if isinstance(data, bytes) else str(data)
    source = _open_source(data, span)
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if file.frames <= 0:
                raise AudioError("empty", f"{name}: no samples")
            first, count = _frames(span, file.frames, rate, name)
            if first:
                file.seek(first)
            samples = file.read(count, dtype="float32", always_2d=True)
        _raise_storage_error(source)
    except (OSError, soundfile.LibsndfileError, TypeError) as error:
        _raise_storage_error(source)
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


def _open_source(data: Recording, span: AudioSpan) -> str | BinaryIO:
    """Return what soundfile can open: a file name, or a file object of the recording's bytes."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    path = _as_path(data)
    if isinstance(path, ObjectPath):
        return _open_object(path, span)
    if span.bytes is None:
        return str(path)
    offset, length = span.bytes
    if length > _MAX_WHOLE:
        return cast(BinaryIO, io.BufferedReader(ByteRange(str(path), offset, length)))
    with open(path, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def _as_path(data: str | StoragePath) -> StoragePath:
    return literal_path(data) if isinstance(data, str) else data


def _open_object(path: ObjectPath, span: AudioSpan) -> BinaryIO:
    """Read a short recording in one request; read a long one on demand. Raises AudioError."""
    try:
        file = path.ranges()
        size = file.size()
        offset, length = span.bytes or (0, size)
        length = min(length, max(0, size - offset))
        if length > _MAX_WHOLE:
            return WatchedReader(ObjectRange(file, offset, length), _READ_AHEAD)
        with file:
            return io.BytesIO(file.read_at(length, offset) if length else b"")
    except FileNotFoundError:
        raise AudioError("missing", f"no such object: {path}") from None


def _raise_storage_error(source: object) -> None:
    """Raise ConnectionError if object storage failed while the recording was read."""
    if isinstance(source, WatchedReader) and source.failed is not None:
        raise ConnectionError(str(source.failed))


def decode_with_retry(path: str | StoragePath, span: AudioSpan = AudioSpan()) -> np.ndarray:
    """Decode a file of the index, retrying while its storage is unavailable.

    Raises AudioError for a bad file, and OSError when its folder or bucket stays unavailable.
    """
    where = _as_path(path)
    if isinstance(where, ObjectPath):
        return retry_storage(lambda: decode(where, span))

    def attempt() -> np.ndarray:
        try:
            return decode(where, span)
        except AudioError:
            _check_readable(where.parent)
        # The folder is readable now, but may not have been before: decode again.
        return decode(where, span)

    return retry_storage(attempt)


def _check_readable(folder: Path) -> None:
    """Raise OSError if a folder is unreadable, or empty as the mount point of a lost mount is."""
    with os.scandir(folder) as entries:
        empty = next(entries, None) is None
    if empty:
        raise FileNotFoundError(errno.ENOENT, "the folder is empty", str(folder))


def decode_blocks(
    data: Recording, seconds: float = 30.0, span: AudioSpan = AudioSpan()
) -> Iterator[np.ndarray]:
    """Yield the samples that `decode` returns, bit for bit, in blocks of about `seconds`.

    Memory does not grow with the file. Raises AudioError as `decode`, once it reaches the fault.
    """
    name = "bytes" if isinstance(data, bytes) else str(data)
    resample: soxr.ResampleStream | None = None
    empty = True
    source = _open_source(data, span)
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
                _raise_storage_error(source)
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
        _raise_storage_error(source)
        raise AudioError("unreadable", f"{name}: {error}") from None
    if empty:
        raise AudioError("empty", f"{name}: no samples")


def fit(audio: np.ndarray, samples: int) -> np.ndarray:
    """Cut or zero-pad audio (S,) to the `samples` in the index.

    Resamplers and codec headers differ by a few samples. Raises AudioError `length mismatch` for a
    difference of more than one encoder frame (20 ms): the file has changed since it was indexed.
    """
    if abs(len(audio) - samples) > FRAME:
        raise AudioError(
            "length mismatch",
            f"decoded {len(audio) / SAMPLING_RATE:.3f} s, expected {samples / SAMPLING_RATE:.3f} s "
            "as in the index",
        )
    if len(audio) >= samples:
        return audio[:samples]
    return np.pad(audio, (0, samples - len(audio)))


def _frames(span: AudioSpan, total: int, rate: int, name: str) -> tuple[int, int]:
    """Convert a span to (first, count) in samples of the file. Raises AudioError."""
    first = round(span.start * rate)
    count = total - first if span.duration is None else round(span.duration * rate)
    # Manifests round to milliseconds, so a span may end slightly after the file.
    slack = rate // 100
    if first < 0 or count <= 0 or first + count > total + slack:
        raise AudioError(
            "span outside the file",
            f"{name}: {span.start} s + {span.duration} s of {total / rate:.3f} s",
        )
    return first, min(count, total - first)
