"""Pool a whole recording into a few soft tokens: what does not change from frame to frame.

Timbre and pace are not a sequence. Each summary token weighs the frames by attention and the
encoder's layers by learnt weights, and carries the mean and the standard deviation of the frames
(attentive statistics pooling, Okabe et al. 2018, arXiv:1803.10963).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from omni.model.shards import uniform_

_HIDDEN = 128  # Width of the attention, as in ECAPA-TDNN (Desplanques et al. 2020).
_LEAST_VARIANCE = 1e-5  # The square root of zero has no finite gradient.


class SummaryPool(nn.Module):
    """Attentive statistics of R recordings, (N, stack * layers * d) to (R * tokens, out_dim).

    Each token starts with the plain mean and deviation, and with all layers alike. Rows of the
    result have unit RMS.
    """

    def __init__(self, tokens: int, stack: int, layers: int, width: int, out_dim: int) -> None:
        super().__init__()
        self.tokens, self.layers, self.width, self.stack = tokens, layers, width, stack
        self.logits = nn.Parameter(torch.zeros(tokens, layers)) if layers > 1 else None
        self.norm_in = nn.RMSNorm(width, eps=1e-6)
        self.hidden = nn.Linear(width, _HIDDEN, bias=False)
        self.scores = nn.Parameter(torch.zeros(tokens, _HIDDEN))
        self.out = nn.Parameter(torch.zeros(tokens, 2 * width, out_dim))
        self.norm_out = nn.RMSNorm(out_dim, eps=1e-6)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        bound = math.sqrt(3.0 / self.width)
        uniform_(self.hidden.weight, -bound, bound, generator)
        bound = math.sqrt(3.0 / (2 * self.width))
        uniform_(self.out, -bound, bound, generator)
        self.scores.zero_()
        for norm in (self.norm_in, self.norm_out):
            norm.weight.fill_(1.0)
        if self.logits is not None:
            self.logits.zero_()

    def forward(self, x_NF: Tensor, starts_N: Tensor, recordings: int) -> Tensor:
        """Summarise stacked frames.

        starts_N: True where a recording begins. recordings: their number, on the host, so that no
        device is waited for. Frames of zeros, which fill up the last row of a recording, count for
        nothing.
        """
        dtype = self.norm_in.weight.dtype
        frames = x_NF.view(-1, self.layers, self.width).to(dtype)  # (M, layers, d)
        owner = (starts_N.cumsum(0) - 1).repeat_interleave(
            self.stack, output_size=len(x_NF) * self.stack
        )
        real = frames[:, 0].abs().sum(-1) > 0
        if self.logits is None:
            mixed = frames.expand(-1, self.tokens, -1)
        else:
            mixed = torch.einsum("mld,kl->mkd", frames, self.logits.softmax(-1))
        normed = self.norm_in(mixed)
        scores = torch.einsum("mkh,kh->mk", torch.tanh(self.hidden(normed)), self.scores)
        weights = _softmax(scores.float(), real, owner, recordings)[..., None]
        values = normed.float()
        mean = values.new_zeros(recordings, self.tokens, self.width)
        mean = mean.index_add(0, owner, weights * values)
        spread = torch.zeros_like(mean)
        spread = spread.index_add(0, owner, weights * (values - mean[owner]).square())
        deviation = (spread + _LEAST_VARIANCE).sqrt()
        pooled = torch.cat((mean, deviation), -1).to(dtype)
        soft: Tensor = self.norm_out(torch.einsum("rkf,kfc->rkc", pooled, self.out).to(dtype))
        return soft.flatten(0, 1)


def _softmax(scores_MK: Tensor, real_M: Tensor, owner_M: Tensor, recordings: int) -> Tensor:
    """Normalise the scores of the real frames of each recording."""
    scores = scores_MK.masked_fill(~real_M[:, None], float("-inf"))
    index = owner_M[:, None].expand_as(scores)
    # The largest score may be any constant for the gradient, and no frame of a recording may be
    # real (silence that is exactly zero): its weights are zero then.
    largest = scores.new_full((recordings, scores.shape[1]), -1e4)
    largest = largest.scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - largest[owner_M]).exp()
    total = torch.zeros_like(largest).index_add(0, owner_M, weights)
    return weights / total.clamp(min=torch.finfo(total.dtype).tiny)[owner_M]
