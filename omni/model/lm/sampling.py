"""Choose the next token: the most probable one, or drawn from the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    def draws(self, row: int) -> np.random.Generator:
        """Make the source of the draws of a row."""
        return np.random.default_rng((self.seed, row))


def choose(
    logits_BV: Tensor, sampling: Sampling, draws: Sequence[np.random.Generator | None]
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row; returns ids (B,) and the log-probability of each, in nats.

    draws: of each row; None where nothing is continued. Log-probabilities are those of the model,
    whatever the temperature.
    """
    if sampling.temperature == 0.0:
        best = logits_BV.max(-1)
        return best.indices, best.values - logits_BV.logsumexp(-1)
    scaled = (logits_BV / sampling.temperature).softmax(-1)
    ordered = scaled.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = ordered.values.masked_fill(before >= sampling.top_p, 0.0).cumsum(-1)
    drawn = [0.0 if source is None else source.random() for source in draws]
    points = torch.tensor(drawn, dtype=kept.dtype, device=kept.device)[:, None] * kept[:, -1:]
    places = torch.searchsorted(kept, points, right=True).clamp(max=kept.shape[-1] - 1)
    ids = ordered.indices.gather(1, places)
    return ids[:, 0], logits_BV.gather(1, ids)[:, 0] - logits_BV.logsumexp(-1)
