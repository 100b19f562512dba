"""Decode recordings to 16 kHz mono float32; each kind of bad recording has one reason."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import soxr

from omni.audio.levels import Levels
from omni.audio.link import MISSING
from omni.audio.recording import (
    AudioError,
    AudioSpan,
    FetchedRecording,
    OpenRecording,
    RecordingData,
    Stream,
    as_recording_path,
)
from omni.audio.windows import FRAME, SAMPLING_RATE
from omni.storage.path import ObjectPath, StoragePath
from omni.storage.retry import retry_storage

__all__ = [
    "AudioError", "AudioSpan", "RecordingData", "decode", "decode_blocks", "decode_with_retry",
    "fit", "measure", "read_with_retry", "resampled_length",
]  # fmt: skip

_NO_SPAN = AudioSpan()
T = TypeVar("T")


def resampled_length(frames: int, rate: int) -> int:
    """Convert a number of samples at `rate` to the number at 16 kHz."""
    return round(frames * SAMPLING_RATE / rate)


def measure(data: RecordingData, span: AudioSpan = _NO_SPAN) -> int:
    """Return the number of samples that `decode` will return.

    The length is read from the structure of the file, and decoded where that leaves a doubt.

    data: a path or plain URI (`omni.storage.path.literal_path`), or the bytes of a file.

    Raises AudioError: `missing`, `unreadable`, `empty`, `implausible header`, `span outside the
    file`, `shorter than its header says`, `longer than its header says`, `parts are missing`; and
    OSError when object storage is unavailable.
    """
    if not isinstance(data, (bytes, FetchedRecording)):
        path = as_recording_path(data)
        if isinstance(path, Path) and not path.is_file():
            raise AudioError("missing", f"no such file: {data}")
    with OpenRecording(data, span) as recording:
        parts = _parts(recording, span)
        samples = sum(resampled_length(count, stream.rate) for stream, _, count in parts)
        reason, _, detail = recording.fault.partition("\n")
        # A span with an end lies before a missing end, which `_parts` has checked.
        if reason and (span.duration is None or reason == MISSING):
            raise AudioError(reason, f"{recording.name}: {detail}")
        if samples == 0:
            [(stream, _, count), *_] = parts
            raise AudioError("empty", f"{recording.name}: {count} frames at {stream.rate} Hz")
        return samples


def decode(
    data: RecordingData,
    span: AudioSpan = _NO_SPAN,
    *,
    samples: int | None = None,
    notes: list[str] | None = None,
    allow_silence: bool = False,
) -> np.ndarray:
    """Decode to (S,) float32 mono at 16 kHz.

    Channels are averaged. Where they cancel each other out, the loudest is taken instead, and
    `notes` gets a line that says so.

    data: a path or plain URI, or the bytes of a file that libsndfile or PyAV reads.
    samples: the length in the index; decoding stops at a recording that turns out longer.
    Raises AudioError: those of `measure` except for what the header says, `not finite`, `silent`
    (unless `allow_silence`), `not in [-1, 1]`, `length mismatch`; and OSError when object storage
    is unavailable.
    """
    with OpenRecording(data, span) as recording:
        parts = _parts(recording, span)
        levels = Levels()
        audio = _joined(_mono(recording, parts, levels, None), samples)
        if (channel := levels.channel_instead_of_mean()) is not None:
            if notes is not None:
                notes.append(levels.choice)
            levels = Levels()
            audio = _joined(_mono(recording, parts, levels, channel), samples)
        if not len(audio):
            raise AudioError("empty", f"{recording.name}: no samples")
        levels.check(recording.name, allow_silence)
    return audio


def decode_blocks(
    data: RecordingData,
    seconds: float = 30.0,
    span: AudioSpan = _NO_SPAN,
    *,
    notes: list[str] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the samples that `decode` returns, bit for bit, in blocks of about `seconds` at most.

    Memory does not grow with the file: one of several channels is read twice, first for its levels.
    Raises AudioError as `decode`, once it reaches the fault.
    """
    with OpenRecording(data, span) as recording:
        parts = _parts(recording, span)
        channel = None
        if any(stream.channels > 1 for stream, _, _ in parts):
            levels = Levels()
            for _ in _mono(recording, parts, levels, None, resample=False):
                pass
            channel = levels.channel_instead_of_mean()
            if channel is not None and notes is not None:
                notes.append(levels.choice)
        levels, empty = Levels(), True
        for block in _mono(recording, parts, levels, channel, seconds=seconds):
            empty = False
            yield block
        if empty:
            raise AudioError("empty", f"{recording.name}: no samples")
        levels.check(recording.name)


def decode_with_retry(
    path: str | StoragePath,
    span: AudioSpan = _NO_SPAN,
    *,
    samples: int | None = None,
    notes: list[str] | None = None,
    allow_silence: bool = False,
) -> np.ndarray:
    """Decode a file of the index as `decode`, retrying while its storage is unavailable.

    Raises AudioError for a bad file, and OSError when its folder or bucket stays unavailable.
    """
    return read_with_retry(
        path,
        lambda where: decode(
            where, span, samples=samples, notes=notes, allow_silence=allow_silence
        ),
    )


def read_with_retry(path: str | StoragePath, read: Callable[[StoragePath], T]) -> T:
    """Call `read` with a file of the index, again while its storage is unavailable.

    Raises AudioError for a bad file, and OSError when its folder or bucket stays unavailable.
    """
    where = as_recording_path(path)
    if isinstance(where, ObjectPath):
        return retry_storage(lambda: read(where))

    def attempt() -> T:
        try:
            return read(where)
        except AudioError:
            _check_readable(where.parent)
        # The folder is readable now, but may not have been before: read again.
        return read(where)

    return retry_storage(attempt)


def _check_readable(folder: Path) -> None:
    """Raise OSError if a folder is unreadable, or empty as the mount point of a lost mount is."""
    with os.scandir(folder) as entries:
        empty = next(entries, None) is None
    if empty:
        raise FileNotFoundError(errno.ENOENT, "the folder is empty", str(folder))


def fit(audio: np.ndarray, samples: int) -> np.ndarray:
    """Cut or zero-pad audio (S,) to the `samples` in the index.

    Resamplers and codec headers differ by a few samples. Raises AudioError `length mismatch` for a
    difference of more than one encoder frame (20 ms): the file has changed since it was indexed, or
    its length was taken from a wrong header then.
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


_Part = tuple[Stream, int, int]  # stream, first of its samples, and their number


def _parts(recording: OpenRecording, span: AudioSpan) -> list[_Part]:
    """Convert a span in seconds to samples of the streams. Raises AudioError."""
    streams = recording.streams
    lengths = [recording.frames(stream) for stream in streams]
    name = recording.name
    if not any(lengths):
        raise AudioError("empty", f"{name}: no samples")
    if len(streams) == 1:
        [stream], [length] = streams, lengths
        return [(stream, *_frames(span, length, stream.rate, name))]
    parts: list[_Part] = []
    began = 0.0  # seconds into the recording
    total = sum(length / s.rate for s, length in zip(streams, lengths, strict=True))
    end = total if span.duration is None else span.start + span.duration
    # Manifests round to milliseconds, so a span may end slightly after the file.
    if span.start < 0 or end <= span.start or end > total + 0.01:
        raise _outside(name, span, total)
    for stream, length in zip(streams, lengths, strict=True):
        first = max(0, round((span.start - began) * stream.rate))
        stop = min(length, round((end - began) * stream.rate))
        if stop > first:
            parts.append((stream, first, stop - first))
        began += length / stream.rate
    if not parts:
        raise _outside(name, span, total)
    return parts


def _frames(span: AudioSpan, total: int, rate: int, name: str) -> tuple[int, int]:
    """Convert a span to (first, count) in samples of the file. Raises AudioError."""
    first = round(span.start * rate)
    count = total - first if span.duration is None else round(span.duration * rate)
    # Manifests round to milliseconds, so a span may end slightly after the file.
    slack = rate // 100
    if first < 0 or count <= 0 or first + count > total + slack:
        raise _outside(name, span, total / rate)
    return first, min(count, total - first)


def _outside(name: str, span: AudioSpan, seconds: float) -> AudioError:
    detail = f"{name}: {span.start} s + {span.duration} s of {seconds:.3f} s"
    return AudioError("span outside the file", detail)


def _mono(
    recording: OpenRecording,
    parts: list[_Part],
    levels: Levels,
    channel: int | None,
    resample: bool = True,
    seconds: float = 30.0,
) -> Iterator[np.ndarray]:
    """Yield the samples of one channel, or the mean of all, at 16 kHz; measure their levels.

    Each stream has a resampler of its own, because their rates may differ.
    """
    for stream, first, count in parts:
        convert = resample and stream.rate != SAMPLING_RATE
        resampler = soxr.ResampleStream(stream.rate, SAMPLING_RATE, 1, dtype="float32")
        blocks = stream.blocks(first, count, max(1, round(seconds * stream.rate)))
        while True:
            with recording.reading():
                block = next(blocks, None)
            if block is None:
                break
            mono = levels.add(block, channel, recording.name)
            if convert:
                mono = resampler.resample_chunk(np.ascontiguousarray(mono))
            if len(mono):
                yield np.ascontiguousarray(mono, dtype=np.float32)
        if convert and len(last := resampler.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield last


def _joined(blocks: Iterator[np.ndarray], samples: int | None) -> np.ndarray:
    """Concatenate blocks; stop where they are longer than the index says. Raises AudioError."""
    taken: list[np.ndarray] = []
    length = 0
    for block in blocks:
        taken.append(block)
        length += len(block)
        if samples is not None and length > samples + FRAME:
            fit(np.concatenate(taken), samples)
    return np.concatenate(taken) if taken else np.zeros(0, np.float32)
