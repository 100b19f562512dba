"""Choose the next token: the most probable one, or drawn from the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_COLDEST = 1e-6
"""Lowest temperature to divide by: that of the most probable token."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of tokens.

    A row's draws depend on the seed and on its own number, not on its neighbours in the batch.
    """

    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0: the most probable token is taken."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")

    @property
    def draws_tokens(self) -> bool:
        """True where tokens are drawn, False where the most probable ones are taken."""
        return self.temperature > 0.0

    def draws(self, row: int) -> np.random.Generator:
        """Make the source of the draws of a row."""
        return np.random.default_rng((self.seed, row))


GREEDY = Sampling()


def choose(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    draws: Sequence[np.random.Generator | None],
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row; returns ids (B,) and the log-probability of each, in nats.

    samplings: of each row. draws: of each row; None where nothing is continued. Log-probabilities
    are those of the model, whatever the temperature.
    """
    best = logits_BV.max(-1)
    ids, chosen = best.indices, best.values
    drawn = [n for n, source in enumerate(draws) if source and samplings[n].draws_tokens]
    if drawn:
        rows = torch.tensor(drawn, device=ids.device)
        points = [source.random() for n in drawn if (source := draws[n]) is not None]
        found = _draw(logits_BV.index_select(0, rows), [samplings[n] for n in drawn], points)
        ids = ids.index_copy(0, rows, found)
        chosen = logits_BV.gather(1, ids[:, None])[:, 0]
    return ids, chosen - logits_BV.logsumexp(-1)


def _draw(logits_BV: Tensor, samplings: Sequence[Sampling], points: list[float]) -> Tensor:
    """Return the token of each row at which the sum of the probabilities reaches its point."""
    given = [
        [max(s.temperature, _COLDEST) for s in samplings],
        [s.top_p for s in samplings],
        points,
    ]
    # Sent at once: the host waits for each tensor that it sends.
    sent = torch.tensor(given, device=logits_BV.device)[..., None]
    temperatures, top_ps, at = sent[0], sent[1], sent[2]
    # Differences to the largest logit stay finite, however low the temperature.
    below = logits_BV.float() - logits_BV.float().max(-1, keepdim=True).values
    scaled = (below / temperatures).softmax(-1)
    ordered = scaled.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    outside = before >= top_ps
    kept = ordered.values.masked_fill(outside, 0.0).cumsum(-1)
    places = torch.searchsorted(kept, at * kept[:, -1:], right=True)
    # A point that was rounded up to the whole sum is the last token's that is kept.
    last = (~outside).sum(-1, keepdim=True) - 1
    return ordered.indices.gather(1, torch.minimum(places, last))[:, 0]
