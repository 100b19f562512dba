"""Prefix beam search against all paths: a wide beam is exact, and a row is decoded by itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from omni.model.ctc_beam import prefix_beam_search

LENGTHS, CLASSES = [5, 3, 1, 4], 4  # three labels and the blank


@pytest.fixture(params=range(4))
def log_probs(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(request.param)
    shape = (len(LENGTHS), max(LENGTHS), CLASSES)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (2 * logits).log_softmax(-1)


def over_all_paths(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every label sequence, summed over its paths."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(CLASSES), repeat=len(log_probs)):
        labels = tuple(label for label, _ in itertools.groupby(path) if label != CLASSES - 1)
        log_prob = sum(float(log_probs[t, label]) for t, label in enumerate(path))
        found[labels] = found.get(labels, 0.0) + math.exp(log_prob)
    return found


def test_a_wide_beam_finds_every_sequence_with_its_probability(log_probs: Tensor) -> None:
    found = prefix_beam_search(log_probs, LENGTHS, beam=400, labels_per_frame=CLASSES - 1)
    for of_row, row, length in zip(found, log_probs, LENGTHS, strict=True):
        expected = over_all_paths(row[:length])
        assert len(of_row) == len(expected)
        assert {tuple(h.labels) for h in of_row} == expected.keys()
        for h in of_row:
            assert math.exp(h.log_prob) == pytest.approx(expected[tuple(h.labels)], rel=1e-9)
        assert of_row == sorted(of_row, key=lambda h: -h.log_prob)


def test_a_narrow_beam_is_the_same_in_any_batch(log_probs: Tensor) -> None:
    together = prefix_beam_search(log_probs, LENGTHS, beam=3, labels_per_frame=2)
    for of_row, row, length in zip(together, log_probs, LENGTHS, strict=True):
        [alone] = prefix_beam_search(row[None, :length], [length], beam=3, labels_per_frame=2)
        assert [h.labels for h in alone] == [h.labels for h in of_row] and len(alone) <= 3
        expected = over_all_paths(row[:length])
        assert all(math.exp(h.log_prob) <= expected[tuple(h.labels)] + 1e-12 for h in alone)


def test_a_repeated_label_needs_a_blank_between() -> None:
    certain = torch.full((2, 3, 2), -1e3)
    certain[0, :, 0] = 0.0  # 0 0 0
    certain[1, [0, 1, 2], [0, 1, 0]] = 0.0  # 0 blank 0
    found = prefix_beam_search(certain, [3, 3], beam=4, labels_per_frame=1)
    assert [of_row[0].labels for of_row in found] == [[0], [0, 0]]
