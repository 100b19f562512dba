"""Confidence intervals of error rates, and paired tests, by resampling utterances.

Bisani and Ney, Bootstrap estimates for confidence intervals in ASR performance evaluation (2004):
utterances are drawn with replacement, and the rate of each draw is the sum of its errors over the
sum of its units. Words of an utterance are not independent, so words are not drawn by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 10_000
_LEVEL = 0.95
_CHUNK = 4_000_000
"""Counts that are drawn at a time."""


@dataclass(frozen=True)
class PairedTest:
    """Difference of two error rates on the same utterances, second minus first.

    p: two-sided, twice the share of draws in which the difference has the other sign; at least
    2 / (draws + 1), since more draws could find one.
    """

    difference: float
    low: float
    high: float
    p: float


def rate_interval(
    errors: Sequence[float], units: Sequence[float], *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % interval of sum(errors) / sum(units) over utterances.

    errors, units: of each utterance. None for fewer than two utterances, or without units.
    """
    if len(errors) < 2 or not sum(units):
        return None
    rates = np.concatenate(
        [_ratio(drawn @ np.asarray(errors), drawn @ np.asarray(units))
         for drawn in _draws(len(errors), samples, seed)]
    )  # fmt: skip
    return _bounds(rates)


def paired_test(
    first: Sequence[float],
    second: Sequence[float],
    units: Sequence[float],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> PairedTest | None:
    """Test whether two systems differ on the same utterances.

    first, second: errors of each utterance; units: of each utterance, the same for both. None for
    fewer than two utterances, or without units.
    """
    if len(units) < 2 or not sum(units):
        return None
    gained = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    rates = np.concatenate(
        [_ratio(drawn @ gained, drawn @ np.asarray(units))
         for drawn in _draws(len(units), samples, seed)]
    )  # fmt: skip
    low, high = _bounds(rates)
    tail = min(int((rates <= 0).sum()), int((rates >= 0).sum()))
    difference = float(gained.sum() / sum(units))
    return PairedTest(difference, low, high, min(1.0, 2 * (tail + 1) / (len(rates) + 1)))


def _draws(utterances: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each utterance occurs in each draw, (draws, utterances) float64."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // utterances)
    for first in range(0, samples, size):
        count = min(size, samples - first)
        chosen = rng.integers(utterances, size=(count, utterances))
        flat = chosen + utterances * np.arange(count)[:, None]
        counts = np.bincount(flat.ravel(), minlength=count * utterances)
        yield counts.reshape(count, utterances).astype(np.float64)


def _ratio(errors: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Divide; a draw without units, of empty references alone, has no rate and is left out."""
    held = units > 0
    ratio: np.ndarray = errors[held] / units[held]
    return ratio


def _bounds(rates: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(rates, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
