"""Cross-entropy and distillation over a large vocabulary, computed in chunks of positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in fp32


def token_losses(
    head: Callable[[Tensor], Tensor], vocabulary: int, hidden_SC: Tensor, targets_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each position and whether its most likely token is the target.

    head maps hidden states (..., C) to fp32 logits (..., V). Returns (S,) fp32 and (S,) bool.
    Chunks are recomputed in the backward pass, so that at most `LOGITS_PER_CHUNK` logits are in
    memory at a time.
    """

    def chunk_losses(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        correct = logits.detach().argmax(-1) == targets
        return F.cross_entropy(logits, targets, reduction="none"), correct

    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    if len(targets_S) <= size:
        return chunk_losses(hidden_SC, targets_S)
    chunks = zip(torch.split(hidden_SC, size), torch.split(targets_S, size), strict=True)
    parts = [checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@dataclass(frozen=True)
class Distillation:
    """Settings of the divergence between teacher and student."""

    temperature: float
    """Divides the logits of both."""
    end: int
    """Id of the token that ends an answer."""
    end_weight: float
    """Weight of that token's divergence: text alone predicts the end of an answer less sharply."""


class _Head(Protocol):
    def logits(self, hidden: Tensor) -> Tensor: ...


def kl_divergence(
    lm: _Head, student_SC: Tensor, teacher_SC: Tensor, targets_S: Tensor, settings: Distillation
) -> Tensor:
    """Sum T^2 KL(teacher || student) of next-token distributions over S positions, as ultravox.

    Teacher: the LM given the transcript. Student: the LM given the audio. Both are (S, C) hidden
    states under the same head. T^2 makes the size of the gradient independent of the temperature T
    (Hinton et al., 2015).
    """

    def chunk_divergence(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(lm.logits(teacher) / settings.temperature, dim=-1)
        predicted = F.log_softmax(lm.logits(student) / settings.temperature, dim=-1)
        divergence = F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)
        weights = torch.where(targets == settings.end, settings.end_weight, 1.0)
        return (divergence * weights).sum() * settings.temperature**2

    if not len(targets_S):
        return student_SC.sum() * 0.0
    size = max(1, LOGITS_PER_CHUNK // lm.logits(student_SC[:1].detach()).shape[-1])
    chunks = zip(*(torch.split(t, size) for t in (student_SC, teacher_SC, targets_S)), strict=True)
    parts = [checkpoint(chunk_divergence, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(parts).sum()
