"""Draw how each sentence is spoken, and bring the voice to one rate, frame and loudness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import soxr

from omni.audio.windows import SAMPLING_RATE

ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
VOICES: dict[str, tuple[str, ...]] = {
    "hibari": ("heart",),
    "flite": ("kal16", "awb", "rms", "slt"),
    "espeak-ng": tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS),
}
MIXTURE = {"hibari": 0.4, "flite": 0.4, "espeak-ng": 0.2}
"""Share of the sentences that each program speaks; docs/omni-tiny.md says why."""
_SPEEDS = {"hibari": (0.85, 1.2), "flite": (0.8, 1.25), "espeak-ng": (0.75, 1.15)}
_PITCH = (30, 70)  # of espeak-ng's 0 to 99
_LEVEL_DB = (-35.0, -15.0)  # root mean square of the speech, relative to full scale
_SILENCE_SECONDS = (0.05, 0.4)  # before the speech, and after it
_PEAK = 0.98
_FRAME = 160  # samples: 10 ms
_QUIET = 1e-3
"""Root mean square of a silent frame, relative to that of the loudest: 60 dB below it."""
_LETTER_SECONDS = (0.025, 0.2)  # Pace of letters outside of it: words are missing, or a hang.


class SpeechError(ValueError):
    """A program did not speak a sentence; the text is the reason, for counting."""


@dataclass(frozen=True)
class Take:
    """Describe how one sentence is spoken. before, after: seconds of silence."""

    program: str
    voice: str
    speed: float
    pitch: int
    level_db: float
    before: float
    after: float
    seed: int

    @property
    def speaker(self) -> str:
        return f"{self.program}-{self.voice}".replace("+", "-")


def draw_take(seed: int, number: int, mixture: Mapping[str, float]) -> Take:
    """Draw the take of utterance `number`: a function of seed, number and mixture alone."""
    rng = np.random.default_rng([seed, number])
    names = sorted(mixture)
    shares = np.array([mixture[name] for name in names])
    program = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    voices = VOICES[program]
    return Take(
        program=program,
        voice=voices[int(rng.integers(len(voices)))],
        speed=round(float(rng.uniform(*_SPEEDS[program])), 3),
        pitch=int(rng.integers(_PITCH[0], _PITCH[1] + 1)),
        level_db=float(rng.uniform(*_LEVEL_DB)),
        before=float(rng.uniform(*_SILENCE_SECONDS)),
        after=float(rng.uniform(*_SILENCE_SECONDS)),
        seed=int(rng.integers(1 << 31)),
    )


def order_of(count: int, seed: int, number: int) -> int:
    """Return which of `count` sentences utterance `number` speaks; each once per pass."""
    passed, position = divmod(number, count)
    return int(_permutation(count, seed, passed)[position])


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(count: int, seed: int, passed: int) -> np.ndarray:
    key = (count, seed, passed)
    if key not in _permutations:
        _permutations.clear()
        _permutations[key] = np.random.default_rng([seed, passed, count]).permutation(count)
    return _permutations[key]


def finish(audio: np.ndarray, rate: int, take: Take, text: str) -> np.ndarray:
    """Return (S,) int16 at 16 kHz: the speech at the take's level, between its silences.

    Raises SpeechError for audio that cannot be the sentence.
    """
    mono = np.asarray(audio, np.float32).reshape(-1)
    if not np.isfinite(mono).all():
        raise SpeechError("not finite")
    speech = _without_silence(soxr.resample(mono, rate, SAMPLING_RATE))
    letters = sum(c.isalpha() for c in text)
    pace = len(speech) / SAMPLING_RATE / letters
    if not _LETTER_SECONDS[0] <= pace <= _LETTER_SECONDS[1]:
        raise SpeechError("implausible pace")
    level = float(np.sqrt(np.mean(np.square(speech, dtype=np.float64))))
    gain = min(10 ** (take.level_db / 20) / level, _PEAK / float(np.abs(speech).max()))
    silences = [np.zeros(round(s * SAMPLING_RATE), np.float32) for s in (take.before, take.after)]
    whole = np.concatenate([silences[0], speech * gain, silences[1]])
    return np.round(whole * 32767).astype(np.int16)


def _without_silence(audio: np.ndarray) -> np.ndarray:
    """Cut the silence that each program adds at both ends."""
    frames = len(audio) // _FRAME
    if not frames:
        raise SpeechError("no speech")
    blocks = audio[: frames * _FRAME].reshape(frames, _FRAME)
    levels = np.sqrt(np.mean(np.square(blocks, dtype=np.float64), axis=1))
    loud = np.flatnonzero(levels > _QUIET * levels.max())
    if not len(loud):
        raise SpeechError("no speech")
    return audio[loud[0] * _FRAME : (loud[-1] + 1) * _FRAME]


def silence_share(audio: np.ndarray) -> float:
    """Return the share of 10 ms frames that are 60 dB or more below the loudest."""
    frames = len(audio) // _FRAME
    blocks = np.asarray(audio[: frames * _FRAME], np.float64).reshape(frames, _FRAME)
    levels = np.sqrt(np.mean(np.square(blocks), axis=1))
    return float(np.mean(levels <= _QUIET * levels.max()))


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Raise ValueError for programs that are not known, or shares that are none."""
    names: Sequence[str] = sorted(set(mixture) - set(VOICES))
    if names:
        raise ValueError(f"{names[0]}: expected {', '.join(VOICES)}")
    wrong = [name for name, share in mixture.items() if not 0 < share < np.inf]
    if wrong or not mixture:
        raise ValueError(f"{', '.join(wrong) or 'nothing'}: expected shares over 0")
