"""Intervals hold the true rate as often as they promise, and a paired test sees what two do not."""

from __future__ import annotations

import numpy as np
import pytest

from omni.metrics.bootstrap import paired_test, rate_interval

pytestmark = pytest.mark.unit


def _corpus(rng: np.random.Generator, count: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    words = rng.integers(2, 15, count)
    return rng.binomial(words, rate), words


def test_95_of_100_intervals_hold_the_true_rate() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        errors, words = _corpus(rng, 120, 0.3)
        low, high = rate_interval(errors, words, samples=500) or (1.0, 0.0)
        held += low <= 0.3 <= high
    assert 0.90 < held / 300 < 0.985


def test_the_interval_narrows_with_the_root_of_the_utterances() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for count in (100, 1600):
        low, high = rate_interval(*_corpus(rng, count, 0.3)) or (0.0, 0.0)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_a_paired_test_sees_a_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    hard = rng.beta(0.5, 1.2, 300)  # Utterances differ far more than the systems do.
    words = rng.integers(3, 12, 300)
    first = rng.binomial(words, hard)
    second = np.maximum(first - (rng.random(300) < 0.15), 0)
    intervals = [rate_interval(errors, words) or (0.0, 0.0) for errors in (first, second)]
    assert intervals[0][0] < intervals[1][1], "they overlap"
    found = paired_test(first, second, words)
    assert found is not None and found.high < 0 and found.p < 0.01
    assert found.difference == pytest.approx((second.sum() - first.sum()) / words.sum())


def test_equal_systems_do_not_differ() -> None:
    rng = np.random.default_rng(3)
    false = 0
    for _ in range(200):
        errors, words = _corpus(rng, 100, 0.3)
        other, _ = rng.binomial(words, 0.3), words
        found = paired_test(errors, other, words, samples=400)
        assert found is not None
        false += found.p < 0.05
    assert false / 200 < 0.11
    found = paired_test([1, 2], [1, 2], [3, 4])
    assert found is not None and (found.difference, found.p) == (0.0, 1.0)


@pytest.mark.parametrize(("errors", "units"), [([], []), ([1], [3]), ([1, 2], [0, 0])])
def test_too_little_has_no_interval(errors: list[float], units: list[float]) -> None:
    assert rate_interval(errors, units) is None
    assert paired_test(errors, errors, units) is None


def test_a_draw_without_units_is_left_out() -> None:
    low, high = rate_interval([1, 0, 0], [2, 0, 0]) or (0.0, 0.0)
    assert (low, high) == (0.5, 0.5)
