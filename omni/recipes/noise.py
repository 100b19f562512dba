"""Add faint noise to training audio: the effect `omni.recipes.noise:FaintNoise`."""

from __future__ import annotations

import numpy as np

_SNR_DB = (10.0, 40.0)  # ratio of mean powers over the clip
_SLOPE = (0.0, 1.0)
"""Exponents of the amplitude's fall over frequency: 0 is white, 0.5 pink, 1 brown noise."""


class FaintNoise:
    """Add noise between white and brown: synthetic voices are silent where rooms are not."""

    def __call__(self, audio: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return audio of the same length, (S,) float32."""
        spectrum = np.fft.rfft(generator.standard_normal(len(audio)))
        steps = np.maximum(np.arange(len(spectrum)), 1.0)
        noise = np.fft.irfft(spectrum * steps ** -generator.uniform(*_SLOPE), len(audio))
        power = np.mean(np.square(audio, dtype=np.float64))
        noise *= np.sqrt(power * 10 ** (-generator.uniform(*_SNR_DB) / 10) / np.mean(noise**2))
        return (audio + noise).astype(np.float32)
