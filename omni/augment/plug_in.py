"""Effects that `augment.effects` names as plug-ins."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

from omni.audio.decode import AudioError
from omni.audio.windows import SAMPLING_RATE
from omni.config.plug_in import check_methods, make_plug_in
from omni.errors import ConfigError, first_line

_SETTING = "augment.effects"


class Effect(Protocol):
    """Change of a waveform: a pure function of the audio and of what the generator draws."""

    def __call__(self, audio: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return changed audio of the same length, (S,) float32 mono at 16 kHz."""
        ...


@functools.lru_cache
def load_effect(name: str) -> Effect:
    """Construct an effect, once in each process. Raises ConfigError."""
    made: Effect = make_plug_in(name, _SETTING)
    check_methods(made, name, _SETTING, "__call__")
    return made


def check_effect(name: str) -> None:
    """Try an effect on a second of noise. Raises ConfigError for another interface."""
    generator = np.random.default_rng(0)
    audio = generator.uniform(-0.1, 0.1, SAMPLING_RATE).astype(np.float32)
    try:
        first, second = (apply_effect(name, audio, np.random.default_rng(1)) for _ in range(2))
    except AudioError as error:
        raise ConfigError(f"{_SETTING}: {error.detail}") from None
    if not np.array_equal(first, second):
        raise ConfigError(
            f"{_SETTING}: {name}: the same generator gave other audio; expected every random "
            "number from the generator, so that a continued run repeats itself"
        )


def apply_effect(name: str, audio: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Apply an effect. Raises AudioError, so that a failure rejects only its utterance."""
    effect = load_effect(name)
    try:
        changed = np.asarray(effect(audio.copy(), generator))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise AudioError("failed effect", f"{name}: {reason}") from None
    if changed.shape != audio.shape or not np.issubdtype(changed.dtype, np.floating):
        raise AudioError(
            "failed effect",
            f"{name}: expected {audio.shape} float32, got {changed.shape} {changed.dtype}",
        )
    if not np.isfinite(changed).all():
        raise AudioError("failed effect", f"{name}: its audio is not finite")
    return changed.astype(np.float32, copy=False)
