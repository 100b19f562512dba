"""CTC heads: the transcript read off soft tokens alone, before the language model sees them.

(N, C) soft tokens of unit size to (N, V + 1) logits; the last is the blank's.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Embeds(Protocol):
    def embedding_matrix(self) -> Tensor: ...


class LinearCTC(nn.Module):
    """A linear layer of its own, for a language model whose embeddings mean nothing yet."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary + 1, width))
        self.bias = nn.Parameter(torch.empty(vocabulary + 1))
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.bias.zero_()
        self.weight.normal_(0.0, 0.02, generator=generator)

    def forward(self, soft_NC: Tensor, lm: _Embeds) -> Tensor:
        return F.linear(soft_NC, self.weight, self.bias)


class TiedCTC(nn.Module):
    """Scores against the language model's own token embeddings, with a vector for the blank.

    A soft token that stands for a word comes to lie where that word's embedding lies, so that a
    language model trained on text can read it before it has seen any.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.empty(width))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.blank_bias = nn.Parameter(torch.empty(1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.blank.normal_(0.0, 1.0, generator=generator)
        self.log_scale.zero_()
        self.blank_bias.zero_()

    def forward(self, soft_NC: Tensor, lm: _Embeds) -> Tensor:
        rows = lm.embedding_matrix()
        size = rows.detach().float().square().mean().sqrt()
        scale = self.log_scale.exp() * len(self.blank) ** -0.5
        words = F.linear(soft_NC.to(rows.dtype), rows).float() * (scale / size)
        blank = (soft_NC.float() @ self.blank) * scale + self.blank_bias
        return torch.cat((words, blank[:, None]), dim=-1)


CTCHead = LinearCTC | TiedCTC
