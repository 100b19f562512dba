"""Read corpora of noises and room impulse responses: manifests of recordings without text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni.audio.decode import AudioError, AudioSpan, decode_with_retry
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.audio_paths import recording_uri
from omni.corpus.index_row import span_of
from omni.corpus.lengths import measure_all
from omni.corpus.manifest import manifest_path, stated_duration
from omni.corpus.text_file import json_lines
from omni.errors import ManifestError
from omni.storage.digest import digest
from omni.storage.path import StoragePath, raise_if_unreachable
from omni.storage.uri import public_uri, reason_of

_SHORTEST = SAMPLING_RATE // 10  # samples; fewer may be less than a frame of a low-rate file


@dataclass(frozen=True)
class Clip:
    uri: str
    span: AudioSpan
    samples: int  # at 16 kHz
    key: str  # content hash


@dataclass(frozen=True)
class Clips:
    """Recordings to draw from; reading one that cannot be decoded raises AudioError."""

    kind: str  # noise or reverb, for messages
    clips: tuple[Clip, ...] = ()

    def excerpt(self, generator: np.random.Generator, samples: int) -> np.ndarray:
        """Draw (samples,) float32 from anywhere in one recording, repeated where it is shorter."""
        clip = self.clips[int(generator.integers(len(self.clips)))]
        length = max(samples, _SHORTEST)
        first = int(generator.integers(max(1, clip.samples - length + 1)))
        shift = int(generator.integers(clip.samples))
        if clip.samples < length:
            return np.resize(np.roll(self._read(clip, clip.span), -shift), samples)
        start = clip.span.start + first / SAMPLING_RATE
        span = AudioSpan(start, length / SAMPLING_RATE, clip.span.bytes)
        return np.resize(self._read(clip, span), samples)

    def whole(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one recording from start to end."""
        clip = self.clips[int(generator.integers(len(self.clips)))]
        return self._read(clip, clip.span)

    def _read(self, clip: Clip, span: AudioSpan) -> np.ndarray:
        try:
            return decode_with_retry(clip.uri, span, allow_silence=True)
        except AudioError as error:
            raise AudioError(f"unusable {self.kind}", str(error)) from None

    @property
    def identity(self) -> str:
        """Hash content, length and order of the recordings, but no paths."""
        return digest(repr([(clip.key, clip.samples) for clip in self.clips]))


def read_clips(
    specs: Sequence[str],
    kind: str,
    *,
    cache_dir: StoragePath | None = None,
    threads: int = 8,
    allow_absolute: bool = False,
) -> Clips:
    """Read manifests with rows such as {"audio": "rain.wav"}.

    `offset` and `duration` (seconds) select a span; other fields are ignored.

    Raises ManifestError where a manifest is missing, a row is not such a row, or a recording cannot
    be used, since a repeated run must draw the same noises. OSError: storage is unavailable.
    """
    clips: list[Clip] = []
    for spec in specs:
        path = manifest_path(spec)
        rows = _rows(path, allow_absolute)
        if not rows:
            raise ManifestError(f"{public_uri(spec)}: the manifest has no rows")
        good, bad = measure_all(rows, path, cache_dir, threads)
        if bad:
            raise ManifestError(
                f"{public_uri(spec)}: {len(bad)} of {len(rows)} recordings cannot be used; "
                f"the first, {bad[0].id}: {bad[0].reason}: {bad[0].detail}"
            )
        clips += [Clip(r["uri"], span_of(r), r["samples"], r["key"]) for r in good]
    return Clips(kind, tuple(clips))


def _rows(path: StoragePath, allow_absolute: bool) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as lines:
            return [
                _row(position, row, path.parent, allow_absolute)
                for position, row in json_lines(path, lines)
            ]
    except OSError as error:
        raise_if_unreachable(path, error)
        raise ManifestError(f"{path}: cannot be read: {reason_of(error)}") from None


def _row(
    position: str, row: dict[str, Any], folder: StoragePath, allow_absolute: bool
) -> dict[str, Any]:
    if not isinstance(row.get("audio"), str) or "\0" in row["audio"]:
        raise ManifestError(f'{position}: expected {{"audio": FILE}}, got {str(row)[:40]}')
    try:
        uri = recording_uri(folder, row["audio"], allow_absolute)
    except ValueError as error:
        raise ManifestError(f"{position}: field 'audio': {error}") from None
    start, duration = row.get("offset"), row.get("duration")
    for name, value in (("offset", start), ("duration", duration)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < 1e8):
            raise ManifestError(f"{position}: field {name!r}: expected seconds, got {value!r}")
    return {
        "id": position,
        "uri": uri,
        "offset": None,
        "length": None,
        "start": float(start or 0.0),
        # As in a manifest of speech, without an offset the whole file is meant.
        "duration": None if start is None or duration is None else float(duration),
        "stated_duration": stated_duration(start, duration),
        "text": "a sound",  # Rows without text would be rejected.
        "audios": None,
    }
