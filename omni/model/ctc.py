"""CTC heads: predict the transcript from soft tokens alone, without the language model.

They map soft tokens of unit RMS (N, C) to logits (N, V + 1); the last is the blank's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.model.batch import CTCLabels
from omni.model.losses import LOGITS_PER_CHUNK
from omni.model.shards import normal_

_RMS_ROWS = 4096  # Embeddings whose RMS is measured.
_FULL_SOFTMAX_CLASSES = 4096  # Up to this vocabulary the softmax over all classes is small.


class Embeds(Protocol):
    """A language model, as far as a head uses it."""

    def embedding_matrix(self) -> Tensor: ...


class LinearCTC(nn.Module):
    """A separate linear layer, for a language model that starts from random embeddings."""

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
        normal_(self.weight, 0.0, 0.02, generator)

    def forward(self, soft_NC: Tensor, lm: Embeds) -> Tensor:
        return F.linear(soft_NC, self.weight, self.bias)

    def split(
        self, soft_NC: Tensor, lm: Embeds, tokens_K: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits of the tokens (N, V), or of some (N, K), and of the blank (N, 1)."""
        if tokens_K is not None:
            rows = torch.cat((tokens_K, tokens_K.new_tensor([self.classes - 1])))
            logits = F.linear(soft_NC, self.weight[rows], self.bias[rows])
        else:
            logits = self(soft_NC, lm)
        return logits[:, :-1], logits[:, -1:]


class TiedCTC(nn.Module):
    """Dot products with the language model's token embeddings, and a learnt vector for the blank.

    It pulls a soft token towards the embedding of the token that is spoken, so that a frozen
    language model can use it.
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
        normal_(self.blank, 0.0, 1.0, generator)
        self.log_scale.zero_()
        self.blank_bias.zero_()

    def forward(self, soft_NC: Tensor, lm: Embeds) -> Tensor:
        return torch.cat(self.split(soft_NC, lm), dim=-1)

    def split(
        self, soft_NC: Tensor, lm: Embeds, tokens_K: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `LinearCTC.split`; token logits have the dtype of the embeddings."""
        rows = lm.embedding_matrix()
        some = rows.detach()[:: max(1, len(rows) // _RMS_ROWS)].float()
        rows = rows if tokens_K is None else rows[tokens_K]
        scale = self.log_scale.exp() * len(self.blank) ** -0.5
        scaled = soft_NC.float() * (scale / some.square().mean().sqrt())
        words = F.linear(scaled.to(rows.dtype), rows)
        blank = (soft_NC.float() @ self.blank) * scale + self.blank_bias
        return words, blank[:, None]


CTCHead = LinearCTC | TiedCTC


def ctc_losses(head: CTCHead, soft_NC: Tensor, lm: Embeds, labels: CTCLabels) -> Tensor:
    """Compute the CTC loss of each of U recordings, (U,) fp32.

    soft_NC: the soft tokens of these recordings, one after another. The loss is zero where a
    transcript does not fit into its soft tokens. In a large vocabulary all tokens that do not occur
    in the labels are one class, with the sum of their probabilities: no path contains them, so loss
    and gradient are the same, and (N, V + 1) logits exist for a chunk of rows only.
    """
    if head.classes <= _FULL_SOFTMAX_CLASSES:
        log_probs = F.log_softmax(head(soft_NC, lm).float(), dim=-1)
        blank, flat = head.classes - 1, labels.tokens_L
    else:
        found, flat = labels.classes_K, labels.class_L
        blank = len(found)

        def chunk_log_probs(soft: Tensor) -> Tensor:
            words, blanks = head.split(soft, lm)
            others = words.index_fill(1, found, -torch.inf).float().logsumexp(1, keepdim=True)
            logits = torch.cat((words[:, found].float(), blanks.float(), others), 1)
            return F.log_softmax(logits, dim=-1)

        size = max(1, LOGITS_PER_CHUNK // head.classes)
        if len(soft_NC) <= size:
            log_probs = chunk_log_probs(soft_NC)
        else:
            chunks = torch.split(soft_NC, size)
            log_probs = torch.cat(
                [checkpoint(chunk_log_probs, chunk, use_reentrant=False) for chunk in chunks]
            )
    # Lengths in tensors would be read back by the host.
    return torch.ctc_loss(
        nn.utils.rnn.pad_sequence(list(torch.split(log_probs, list(labels.soft_lengths)))),
        flat,
        labels.soft_lengths,
        labels.lengths,
        blank,
        reduction=0,  # none
        zero_infinity=True,
    )


@dataclass(frozen=True)
class Posteriors:
    """Log-probabilities of K tokens and of the blank at each of N soft tokens."""

    tokens_K: Tensor
    """Token ids, ascending."""
    log_probs_NK: Tensor
    """(N, K + 1) fp32; the last is the blank's."""


@torch.inference_mode()
def posteriors(
    head: CTCHead, soft_NC: Tensor, lm: Embeds, tokens: Iterable[int], most_likely: int
) -> Posteriors:
    """Compute the log-probabilities of all tokens of a small vocabulary, and of some of a large.

    soft_NC: see the module. Of a large vocabulary, those of `tokens` and of the `most_likely` ones
    at each soft token; (N, V) logits exist for a chunk of rows only.
    """
    if head.classes <= _FULL_SOFTMAX_CLASSES:
        log_probs = F.log_softmax(head(soft_NC, lm).float(), dim=-1)
        return Posteriors(torch.arange(head.classes - 1, device=soft_NC.device), log_probs)
    likely, totals = [], []
    for chunk in torch.split(soft_NC, max(1, LOGITS_PER_CHUNK // head.classes)):
        words, blanks = head.split(chunk, lm)
        totals.append(torch.logaddexp(words.float().logsumexp(1, keepdim=True), blanks.float()))
        likely.append(words.topk(most_likely).indices.flatten())
    given = torch.tensor(list(tokens), dtype=torch.long, device=soft_NC.device)
    tokens_K = torch.cat((*likely, given)).unique()
    logits = torch.cat([part.float() for part in head.split(soft_NC, lm, tokens_K)], 1)
    return Posteriors(tokens_K, logits - torch.cat(totals))


def ctc_log_probs(
    log_probs_BTK: Tensor, lengths: Sequence[int], answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Compute the log-probability of each answer to each recording, over all of its paths.

    lengths: soft tokens of each recording. answers: of each recording, as classes of
    `log_probs_BTK`, whose last is the blank. -inf for an answer that does not fit.
    """
    found: list[list[float]] = [[] for _ in answers]
    frames = log_probs_BTK.transpose(0, 1)
    for n in range(max(map(len, answers), default=0)):
        rows = [b for b, of_row in enumerate(answers) if n < len(of_row)]
        chosen = [answers[b][n] for b in rows]
        flat = torch.tensor([label for answer in chosen for label in answer], dtype=torch.long)
        losses = torch.ctc_loss(
            frames if len(rows) == len(answers) else frames[:, rows],
            flat.to(frames.device),
            [lengths[b] for b in rows],
            [len(answer) for answer in chosen],
            frames.shape[-1] - 1,
            reduction=0,  # none
        )
        for b, loss in zip(rows, losses.tolist(), strict=True):
            found[b].append(-loss)
    return found
