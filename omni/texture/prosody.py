"""Measure the prosody of a recording: fundamental frequency, level, speech and pauses.

Speech is found by Silero VAD, F0 by SwiftF0 (Nieradzik 2025, arXiv:2508.18440), a network of 14,386
parameters. Both are streams over blocks of audio, so memory grows by 1 kB per second only. All
measures but the length are of speech alone: hum between the words has neither pitch nor level.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omni.audio.vad import Segmenting, spans_of_probabilities, speech_probabilities
from omni.audio.windows import SAMPLING_RATE

if TYPE_CHECKING:
    from swift_f0 import PitchResult, SwiftF0

LOWEST_HZ, HIGHEST_HZ = 55.0, 600.0
"""Range of F0, from a bass who creaks to a child who shouts."""
_HOP = 256  # samples per frame of SwiftF0
_VOICED = 0.5  # confidence, calibrated by the authors of SwiftF0
_FEWEST_VOICED = 5  # frames: 80 ms
_LEAST_POWER = 1e-12  # -120 dB: less is digital silence.
_SPEECH = Segmenting(longest=1e5, shortest=0.1, silence=0.25, padding=0.0)
"""A pause is a silence of 250 ms or more, as of Goldman-Eisler, Psycholinguistics (1968), on;
shorter ones are mostly closures of plosives."""


@dataclass(frozen=True)
class Prosody:
    """Measures of one recording. None: there is no speech, or of pitch no voiced speech."""

    seconds: float
    speech_seconds: float = 0.0
    """Seconds of speech, without pauses and without the silence around it."""
    pauses: int = 0
    """Silences of at least 250 ms between two spans of speech."""
    pause_seconds: float = 0.0
    level_db: float | None = None
    """Root mean square of the speech in dB; a sine of full scale has -3.01."""
    voiced_share: float | None = None
    """Share of the frames of speech that are voiced."""
    pitch_hz: float | None = None
    """Median F0 over the voiced frames of speech."""
    pitch_semitones: float | None = None
    """Spread: distance of the quartiles of F0."""


def measure_prosody(blocks: Iterable[np.ndarray]) -> Prosody:
    """Measure a recording, (S,) float32 mono at 16 kHz in blocks of any length.

    Deterministic on one machine. Not thread-safe: calls share the networks.
    """
    voice, energies = _Voice(), _Energies()

    def observed() -> Iterator[np.ndarray]:
        for block in blocks:
            voice.push(block)
            energies.push(block)
            yield block

    probabilities, samples = speech_probabilities(observed())
    spans = spans_of_probabilities(probabilities, samples, _SPEECH)
    gaps = [after - stop for (_, stop), (after, _) in zip(spans, spans[1:], strict=False)]
    hz, confidence = voice.frames()
    speech = _mask(spans, len(hz))
    if not speech.any():
        return Prosody(seconds=samples / SAMPLING_RATE)
    voiced_hz = hz[speech & (confidence >= _VOICED)]
    middle = spread = None
    if len(voiced_hz) >= _FEWEST_VOICED:
        low, median, high = np.quantile(voiced_hz, [0.25, 0.5, 0.75])
        middle, spread = float(median), 12 * float(np.log2(high / low))
    return Prosody(
        seconds=samples / SAMPLING_RATE,
        speech_seconds=sum(stop - start for start, stop in spans) / SAMPLING_RATE,
        pauses=len(gaps),
        pause_seconds=sum(gaps) / SAMPLING_RATE,
        level_db=energies.level_db(spans),
        voiced_share=len(voiced_hz) / int(speech.sum()),
        pitch_hz=middle,
        pitch_semitones=spread,
    )


class _Voice:
    """F0 and its confidence in each frame of a stream of audio."""

    def __init__(self) -> None:
        self._stream = _detector().stream(LOWEST_HZ, HIGHEST_HZ)
        self._frames: list[tuple[np.ndarray, np.ndarray]] = []

    def push(self, block: np.ndarray) -> None:
        self._keep(self._stream.push(block, SAMPLING_RATE))

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """End the stream; return Hz and confidence, (frames,) float32 each."""
        self._keep(self._stream.flush())
        hz, confidence = zip(*self._frames, strict=True)
        return np.concatenate(hz), np.concatenate(confidence)

    def _keep(self, found: PitchResult) -> None:
        hz, confidence = found.pitch_hz, found.confidence
        self._frames.append((hz.astype(np.float32), confidence.astype(np.float32)))


class _Energies:
    """Energy of each frame of a stream of audio."""

    def __init__(self) -> None:
        self._left = np.zeros(0, np.float32)
        self._frames: list[np.ndarray] = []

    def push(self, block: np.ndarray) -> None:
        audio = np.concatenate((self._left, block))
        whole = len(audio) // _HOP * _HOP
        self._left = audio[whole:]
        squares = np.square(audio[:whole], dtype=np.float64).reshape(-1, _HOP)
        self._frames.append(squares.sum(axis=1).astype(np.float32))

    def level_db(self, spans: list[tuple[int, int]]) -> float:
        """Return the root mean square, in dB, of the frames in the spans."""
        left = np.square(self._left, dtype=np.float64).sum()
        frames = np.concatenate([*self._frames, [left]])
        inside = _mask(spans, len(frames))
        counts = np.full(len(frames), _HOP)
        counts[-1] = len(self._left)
        power = frames[inside].sum() / max(1, counts[inside].sum())
        return 10 * float(np.log10(max(power, _LEAST_POWER)))


def _mask(spans: list[tuple[int, int]], frames: int) -> np.ndarray:
    """Mark the frames that begin inside one of the spans, which are in samples."""
    mask = np.zeros(frames, bool)
    for start, stop in spans:
        mask[-(-start // _HOP) : -(-stop // _HOP)] = True
    return mask


@functools.cache
def _detector() -> SwiftF0:
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1, spin=False)
