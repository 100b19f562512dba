"""Distillation from the language model that reads what the other one hears.

The loss of ultravox: the Kullback-Leibler divergence of next-token distributions at a temperature,
with more weight on the end of the answer, which text alone tells less sharply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omni.model import loss


@dataclass(frozen=True)
class Distillation:
    """temperature: of both distributions. end: the id that ends an answer, and its weight."""

    temperature: float
    end: int
    end_weight: float


class _Head(Protocol):
    def logits(self, hidden: Tensor) -> Tensor: ...


def kl_divergence(
    lm: _Head, student_SC: Tensor, teacher_SC: Tensor, targets_S: Tensor, settings: Distillation
) -> Tensor:
    """Sum over S positions of T^2 KL(teacher || student), both (S, C) hidden states under one head.

    T^2 keeps the gradient's size whatever the temperature (Hinton et al., 2015).
    """

    def part(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(lm.logits(teacher) / settings.temperature, dim=-1)
        found = F.log_softmax(lm.logits(student) / settings.temperature, dim=-1)
        divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        weights = torch.where(targets == settings.end, settings.end_weight, 1.0)
        return (divergence * weights).sum() * settings.temperature**2

    if not len(targets_S):
        return student_SC.sum() * 0.0
    size = max(1, loss.LOGITS // lm.logits(student_SC[:1].detach()).shape[-1])
    chunks = zip(*(t.split(size) for t in (student_SC, teacher_SC, targets_S)), strict=True)
    parts = [checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(parts).sum()
