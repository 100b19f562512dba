"""Levels of a recording while it is decoded: silence, values out of range, cancelling channels."""

from __future__ import annotations

import numpy as np

from omni.audio.recording import AudioError

_SILENT = 2.0**-15  # one step of 16 bits
_LOUDEST = 4.0  # Lossy codecs and mixes exceed 1 by some dB.
_CANCELLED = 0.5  # share of the energy that uncorrelated channels keep when they are averaged
CHANNEL_CHOSEN = "one channel instead of the mean"


class Levels:
    """Extremes and energies over the blocks of a recording."""

    def __init__(self) -> None:
        self._lowest, self._highest, self._peak = np.inf, -np.inf, 0.0
        self._mean_energy = 0.0
        self._energies = np.zeros(0)  # (channels,)

    def add(self, block: np.ndarray, channel: int | None, name: str) -> np.ndarray:
        """Mix (S, channels) down to one channel, or to the mean; raises AudioError `not finite`."""
        single = block.shape[1] == 1
        if channel is not None and not single:
            mono = block[:, min(channel, block.shape[1] - 1)]
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                mono = block[:, 0] if single else block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise AudioError("not finite", f"{name}: NaN or infinite samples")
        self._lowest = min(self._lowest, float(mono.min()))
        self._highest = max(self._highest, float(mono.max()))
        self._peak = max(self._peak, float(mono.max()), -float(mono.min()))
        if not single:
            self._peak = max(self._peak, float(np.abs(block).max()))
            energies = np.square(block, dtype=np.float64).sum(axis=0)
            if len(energies) > len(self._energies):
                energies[: len(self._energies)] += self._energies
                self._energies = energies
            else:
                self._energies[: len(energies)] += energies
            self._mean_energy += float(np.square(mono, dtype=np.float64).sum())
        return mono

    def channel_instead_of_mean(self) -> int | None:
        """Return the loudest channel where the mean of all would cancel them out.

        Channels of one voice keep all their energy in the mean, unrelated ones 1/n of it (two
        speakers, or one silent channel), opposite ones nothing. Half of 1/n is the limit.
        """
        if len(self._energies) < 2:
            return None
        # The mean over channels of the energy, which equal channels keep.
        usual = self._energies.mean() / len(self._energies)
        if self._mean_energy >= _CANCELLED * usual:
            return None
        return self._loudest

    @property
    def _loudest(self) -> int:
        """The first channel that is as loud as any, but for rounding."""
        return int((self._energies >= 0.99 * self._energies.max()).argmax())

    @property
    def choice(self) -> str:
        """Describe the choice of a channel, for a note: kind and detail, on a line each."""
        return (
            f"{CHANNEL_CHOSEN}\nchannel {self._loudest + 1} of "
            f"{len(self._energies)}: their mean cancels out"
        )

    def check(self, name: str, allow_silence: bool = False) -> None:
        """Raise AudioError `silent` or `not in [-1, 1]`."""
        if self._peak > _LOUDEST:
            raise AudioError("not in [-1, 1]", f"{name}: samples of up to {self._peak:.6g}")
        if not allow_silence and 0 <= self._highest - self._lowest < _SILENT:
            raise AudioError("silent", f"{name}: every sample is {self._highest:.2g}")
