"""CTC heads: the transcript read off soft tokens alone, before the language model sees them.

(N, C) soft tokens of unit size to (N, V + 1) logits; the last is the blank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.model.losses import LOGITS_PER_CHUNK

_SAMPLE = 4096  # rows that tell how large embeddings are
_FEW = 4096  # classes: up to here the whole softmax is small


class _Embeds(Protocol):
    def embedding_matrix(self) -> Tensor: ...


class LinearCTC(nn.Module):
    """A linear layer of its own, for a language model whose embeddings mean nothing yet."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary + 1, width))
        self.bias = nn.Parameter(torch.empty(vocabulary + 1))
        self.classes = vocabulary + 1
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.bias.zero_()
        self.weight.normal_(0.0, 0.02, generator=generator)

    def forward(self, soft_NC: Tensor, lm: _Embeds) -> Tensor:
        return F.linear(soft_NC, self.weight, self.bias)

    def split(self, soft_NC: Tensor, lm: _Embeds) -> tuple[Tensor, Tensor]:
        """Logits of the tokens (N, V) and of the blank (N, 1)."""
        logits = self(soft_NC, lm)
        return logits[:, :-1], logits[:, -1:]


class TiedCTC(nn.Module):
    """Scores against the language model's own token embeddings, with a vector for the blank.

    A soft token that stands for a word comes to lie where that word's embedding lies, so that a
    language model trained on text can read it before it has seen any.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.classes = vocabulary + 1
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
        return torch.cat(self.split(soft_NC, lm), dim=-1)

    def split(self, soft_NC: Tensor, lm: _Embeds) -> tuple[Tensor, Tensor]:
        """As `LinearCTC.split`; the tokens' in the embeddings' dtype."""
        rows = lm.embedding_matrix()
        some = rows.detach()[:: max(1, len(rows) // _SAMPLE)].float()
        scale = self.log_scale.exp() * len(self.blank) ** -0.5
        scaled = soft_NC.float() * (scale / some.square().mean().sqrt())
        words = F.linear(scaled.to(rows.dtype), rows)
        blank = (soft_NC.float() @ self.blank) * scale + self.blank_bias
        return words, blank[:, None]


CTCHead = LinearCTC | TiedCTC


def ctc_losses(
    head: CTCHead, soft_NC: Tensor, lm: _Embeds, lengths: Sequence[int], labels: Sequence[Tensor]
) -> Tensor:
    """(U,) CTC losses of utterances: lengths[u] soft tokens each, in order, and their labels[u].

    Zero where a transcript does not fit into its soft tokens. Only labels that occur can lie on a
    path, so all others of a large vocabulary are one class, whose probability is their sum: the
    loss and its gradient are the same, and (N, V + 1) logits live for a chunk of rows only.
    """
    flat = torch.cat(list(labels))
    if head.classes <= _FEW:
        log_probs = F.log_softmax(head(soft_NC, lm).float(), dim=-1)
        blank = head.classes - 1
    else:
        found, flat = flat.unique(return_inverse=True)
        blank = len(found)

        def part(soft: Tensor) -> Tensor:
            words, blanks = head.split(soft, lm)
            others = words.index_fill(1, found, -torch.inf).float().logsumexp(1, keepdim=True)
            logits = torch.cat((words[:, found].float(), blanks.float(), others), 1)
            return F.log_softmax(logits, dim=-1)

        size = max(1, LOGITS_PER_CHUNK // head.classes)
        if len(soft_NC) <= size:
            log_probs = part(soft_NC)
        else:
            pieces = soft_NC.split(size)
            log_probs = torch.cat([checkpoint(part, p, use_reentrant=False) for p in pieces])
    return F.ctc_loss(
        nn.utils.rnn.pad_sequence(list(log_probs.split(list(lengths)))),
        flat,
        torch.tensor(lengths, device=flat.device),
        torch.tensor([len(label) for label in labels], device=flat.device),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
