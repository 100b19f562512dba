"""Cross-entropy over a large vocabulary, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 24  # fp32 logits of a chunk: 64 MiB


def token_losses(
    head: Callable[[Tensor], Tensor], vocabulary: int, hidden_SC: Tensor, targets_S: Tensor
) -> tuple[Tensor, Tensor]:
    """(S,) cross-entropies under `head`'s fp32 logits, and (S,) whether the best token is right.

    Positions go through the vocabulary in chunks that are computed again for the backward pass, so
    that no more than `LOGITS` fp32 logits lie in memory.
    """

    def part(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        right = logits.detach().argmax(-1) == targets
        return F.cross_entropy(logits, targets, reduction="none"), right

    size = max(1, LOGITS // vocabulary)
    if len(targets_S) <= size:
        return part(hidden_SC, targets_S)
    chunks = zip(hidden_SC.split(size), targets_S.split(size), strict=True)
    parts = [checkpoint(part, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
