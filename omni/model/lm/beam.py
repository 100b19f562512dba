"""Beam search of one answer: several hypotheses side by side, the best by log P per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """Token ids without the end token; log_prob: theirs, and that of the end if it was reached."""

    ids: list[int]
    log_prob: float
    cut: bool

    @property
    def score(self) -> float:
        """Log-probability per token, the end included: sums would favour short answers."""
        return self.log_prob / (len(self.ids) + (not self.cut))


class Beam:
    """Hypotheses of one answer.

    It ends when `width` hypotheses have ended and none that goes on is better than the worst of
    these, or at the limit.
    """

    def __init__(self, width: int, end: int, limit: int) -> None:
        self._width, self._end, self._limit = width, end, limit
        self._ids: list[list[int]] = [[] for _ in range(width)]
        # At the beginning all hypotheses are the same one.
        self.log_probs = [0.0] + [-math.inf] * (width - 1)
        self._ended: list[Hypothesis] = []
        self._done = False

    @property
    def steps(self) -> Sequence[int]:
        """Tokens of any hypothesis that goes on: all have as many."""
        return self._ids[0]

    @staticmethod
    def extend(
        beams: Sequence[Beam | None], log_probs_BV: Tensor, width: int
    ) -> list[list[tuple[int, int]] | None]:
        """Extend the hypotheses of rows, (rows x width, V), by a token each.

        Returns for each row the hypotheses that go on: which one they continue, and the token.
        """
        rows = len(beams)
        before = [[-math.inf] * width if beam is None else beam.log_probs for beam in beams]
        sums = torch.tensor(before, device=log_probs_BV.device)
        vocabulary = log_probs_BV.shape[-1]
        totals = (sums.view(-1, 1) + log_probs_BV).view(rows, -1)
        # Twice as many: each hypothesis may end in one of them.
        best = totals.topk(min(2 * width, totals.shape[1]))
        both = torch.stack((best.indices.double(), best.values.double())).tolist()
        return [
            None
            if beam is None
            else beam._choose(
                [
                    (int(n) // vocabulary, int(n) % vocabulary, value)
                    for n, value in zip(*found, strict=True)
                ]
            )
            for beam, found in zip(beams, zip(*both, strict=True), strict=True)
        ]

    def _choose(self, candidates: Sequence[tuple[int, int, float]]) -> list[tuple[int, int]]:
        """Take the best candidates: (hypothesis, token, log-probability), the best one first."""
        going: list[tuple[int, int, float]] = []
        for rank, (parent, token, log_prob) in enumerate(candidates):
            if token == self._end:
                if rank < self._width and log_prob > -math.inf:
                    self._ended.append(Hypothesis(self._ids[parent], log_prob, False))
            elif len(going) < self._width:
                going.append((parent, token, log_prob))
        self._ended = sorted(self._ended, key=lambda h: -h.score)[: self._width]
        self._ids = [[*self._ids[parent], token] for parent, token, _ in going]
        self.log_probs = [log_prob for _, _, log_prob in going]
        length = len(self._ids[0])
        if length >= self._limit:
            self._ended += [
                Hypothesis(ids, log_prob, True)
                for ids, log_prob in zip(self._ids, self.log_probs, strict=True)
                if log_prob > -math.inf
            ]
            self._done = True
        elif len(self._ended) >= self._width:
            self._done = self._ended[-1].score >= self.log_probs[0] / (length + 1)
        return [(parent, token) for parent, token, _ in going]

    def ended(self) -> list[Hypothesis]:
        """Return the hypotheses that ended, the best one first; none while the search goes on."""
        return sorted(self._ended, key=lambda h: -h.score) if self._done else []
