"""Pool a whole recording into a few soft tokens: what does not change from frame to frame.

Timbre and pace are not a sequence. Each layer of the encoder is pooled over time: mean and
standard deviation of its frames, weighed by attention (attentive statistics pooling, Okabe et al.
2018, arXiv:1803.10963). Most of such a statistic is the same in all recordings, and what differs is
what a voice is known by: so they are centred and scaled as they are in the first recordings of the
training, before a linear map to the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from omni.model.shards import local_part, set_rows, uniform_

_ATTENTION = 128  # Width of the attention, as in ECAPA-TDNN (Desplanques et al. 2020).
_NARROW = 256  # Width between statistics and tokens: of many layers, they are wide.
_LEAST_VARIANCE = 1e-5  # The square root of zero has no finite gradient.
_FEWEST = 2  # recordings that have a deviation


class SummaryPool(nn.Module):
    """Attentive statistics of R recordings, (N, stack * layers * d) to (R * tokens, out_dim).

    The attention starts with all frames alike. Rows of the result have unit RMS. Until `fit`,
    statistics are neither centred nor scaled.
    """

    def __init__(self, tokens: int, stack: int, layers: int, width: int, out_dim: int) -> None:
        super().__init__()
        self.tokens, self.layers, self.width, self.stack = tokens, layers, width, stack
        statistics = 2 * layers * width
        self.hidden = nn.Linear(layers * width, _ATTENTION, bias=False)
        self.scores = nn.Parameter(torch.zeros(_ATTENTION))
        # Saved as weights, and not trained.
        self.centre = nn.Parameter(torch.zeros(statistics), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(2 * layers), requires_grad=False)
        self.narrow = nn.Linear(statistics, _NARROW, bias=False)
        self.out = nn.Parameter(torch.zeros(tokens, _NARROW, out_dim))
        self.norm_out = nn.RMSNorm(out_dim, eps=1e-6)
        self._first: list[Tensor] = []
        """Statistics of this rank's first recordings, while all ranks have too few."""
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.hidden, self.narrow):
            bound = math.sqrt(3.0 / linear.in_features)
            uniform_(linear.weight, -bound, bound, generator)
        bound = math.sqrt(3.0 / _NARROW)
        uniform_(self.out, -bound, bound, generator)
        self.scores.zero_()
        self.centre.zero_()
        self.gain.fill_(1.0)
        self.norm_out.weight.fill_(1.0)

    def forward(self, x_NF: Tensor, starts_N: Tensor, recordings: int) -> Tensor:
        """Summarise stacked frames.

        starts_N: True where a recording begins. recordings: their number, on the host, so that no
        device is waited for. Frames of zeros, which fill up the last row of a recording, count for
        nothing.
        """
        dtype = self.norm_out.weight.dtype
        frames, owner, real = self._frames(x_NF, starts_N)
        scores = torch.tanh(self.hidden(frames.to(dtype))) @ self.scores
        weights = _softmax(scores.float(), real, owner, recordings)
        statistics = self._statistics(frames, weights, owner, recordings)
        standard = (statistics - self.centre) * self.gain.repeat_interleave(self.width)
        narrow = self.narrow(standard.to(dtype))
        soft: Tensor = self.norm_out(torch.einsum("rh,khc->rkc", narrow, self.out).to(dtype))
        return soft.flatten(0, 1)

    @torch.no_grad()
    def fit(
        self,
        parts: Iterable[tuple[Tensor, Tensor, int]],
        all_sum: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> bool:
        """Set centre and gain by the recordings of all ranks, unless they are set. Collective.

        parts: batches of this rank, as the arguments of `forward`. The statistic of each layer has
        a common scale: a few recordings do not tell more. Returns False while they are too few,
        which the next call adds to.
        """
        if float(all_sum(local_part(self.centre).abs().sum())) > 0:
            return True
        for x_NF, starts_N, recordings in parts:
            frames, owner, real = self._frames(x_NF, starts_N)
            weights = _softmax(torch.zeros_like(real, dtype=torch.float32), real, owner, recordings)
            self._first.append(self._statistics(frames, weights, owner, recordings))
        statistics = torch.cat(self._first)
        count = statistics.new_full((1,), float(len(statistics)))
        sums = all_sum(torch.cat((statistics.sum(0), count)))
        if sums[-1] < _FEWEST:
            return False
        centre = sums[:-1] / sums[-1]
        squares = (statistics - centre).square().view(-1, 2 * self.layers, self.width).sum((0, 2))
        variance = all_sum(squares) / (sums[-1] * self.width)
        gain = (variance + _LEAST_VARIANCE).rsqrt()
        set_rows(self.centre, lambda first, end: centre[first:end])
        set_rows(self.gain, lambda first, end: gain[first:end])
        self._first.clear()
        return True

    def _frames(self, x_NF: Tensor, starts_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return frames (M, layers * d), the recording of each, and whether it is no padding."""
        frames = x_NF.view(-1, self.layers * self.width)
        owner = (starts_N.cumsum(0) - 1).repeat_interleave(
            self.stack, output_size=len(x_NF) * self.stack
        )
        return frames, owner, frames.abs().sum(-1) > 0

    def _statistics(
        self, frames_MF: Tensor, weights_M: Tensor, owner_M: Tensor, recordings: int
    ) -> Tensor:
        """Return means, then deviations, of each layer (R, 2 * layers * d), fp32."""
        values, weights = frames_MF.float(), weights_M[:, None]
        mean = values.new_zeros(recordings, values.shape[1])
        mean = mean.index_add(0, owner_M, weights * values)
        spread = torch.zeros_like(mean)
        spread = spread.index_add(0, owner_M, weights * (values - mean[owner_M]).square())
        return torch.cat((mean, (spread + _LEAST_VARIANCE).sqrt()), -1)


def _softmax(scores_M: Tensor, real_M: Tensor, owner_M: Tensor, recordings: int) -> Tensor:
    """Normalise the scores of the real frames of each recording."""
    scores = scores_M.masked_fill(~real_M, float("-inf"))
    # The largest score may be any constant for the gradient, and no frame of a recording may be
    # real (silence that is exactly zero): its weights are zero then.
    largest = scores.new_full((recordings,), -1e4)
    largest = largest.scatter_reduce(0, owner_M, scores.detach(), "amax")
    weights = (scores - largest[owner_M]).exp()
    total = torch.zeros_like(largest).index_add(0, owner_M, weights)
    return weights / total.clamp(min=torch.finfo(total.dtype).tiny)[owner_M]
