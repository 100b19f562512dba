"""Draw the speed of each utterance anew for each epoch.

from omni.storage.digest import digest
A changed speed changes the number of positions, so the plan must know it before decoding.

Everything here is a pure function of (run.seed, epoch, content of the utterance).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni.storage.digest import digest


def changed_length(samples: int, speed: float) -> int:
    """Return the length of `samples` samples played `speed` times as fast."""
    return max(1, round(samples / speed))


def speed_of(speeds: Sequence[float], seed: int, key: str, epoch: int) -> float:
    """Draw the speed of the recording with a content key in an epoch."""
    return speeds[int(_choices(len(speeds), seed, names_of([key]), epoch)[0])]


def names_of(keys: Sequence[str]) -> np.ndarray:
    """Hash content keys to (n,) uint64."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.fromiter((int.from_bytes(d, "little") for d in digests), np.uint64, len(keys))


def _choices(count: int, seed: int, names: np.ndarray, epoch: int) -> np.ndarray:
    """Draw (n,) uniform numbers below `count`.

    The finaliser of SplitMix64 (Steele et al. 2014) is used, since one generator per name would
    take seconds per epoch.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    mixed = names ^ state
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(32)) * np.uint64(count) >> np.uint64(32), np.int64)


@dataclass(frozen=True)
class Speeds:
    """Speeds of all utterances in all epochs, and the positions that they need.

    An utterance that a drawn speed would make longer than a bin keeps its own in that epoch.
    """

    speeds: tuple[float, ...]
    positions: np.ndarray  # (speeds, n) int32; 0: does not fit a bin at that speed
    natural: np.ndarray  # (n,) positions at speed 1; 0: not in the plan
    names: np.ndarray  # (n,) uint64, see names_of
    seed: int

    def of(self, number: int, epoch: int) -> float:
        """Return the speed of one utterance in an epoch."""
        choice = int(_choices(len(self.speeds), self.seed, self.names[number, None], epoch)[0])
        return self.speeds[choice] if self.positions[choice, number] else 1.0

    def lengths(self, epoch: int) -> np.ndarray:
        """Return (n,) positions of all utterances in an epoch; 0 leaves one out."""
        choices = _choices(len(self.speeds), self.seed, self.names, epoch)
        drawn = np.take_along_axis(self.positions, choices[None], axis=0)[0]
        fits = (drawn > 0) & (self.natural > 0)
        return np.where(fits, drawn, self.natural).astype(np.int64)

    @property
    def shortest(self) -> np.ndarray:
        """Return (n,) positions at the fastest speed; 0: not in the plan."""
        fastest = np.where(self.positions > 0, self.positions, self.natural).min(axis=0)
        return np.where(self.natural > 0, fastest, 0)

    @property
    def identity(self) -> bytes:
        """Hash all that determines the lengths of all epochs."""
        positions = np.ascontiguousarray(self.positions, dtype=np.int32).tobytes()
        parts = repr((self.speeds, self.seed)), positions, self.names.tobytes()
        return bytes.fromhex(digest(*parts))
