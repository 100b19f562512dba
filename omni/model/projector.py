"""From Whisper features to the language model's residual stream."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stack_frames(features_TF: Tensor, stack: int) -> Tensor:
    """Concatenate `stack` frames, zero-padded: (T, d) to (ceil(T / stack), stack * d)."""
    frames, width = features_TF.shape
    missing = -frames % stack
    if missing:
        features_TF = F.pad(features_TF, (0, 0, 0, missing))
    return features_TF.reshape(-1, stack * width)


def soft_tokens(frames: int, stack: int) -> int:
    """Positions that `frames` encoder frames take in a sequence."""
    return -(-frames // stack)


class Projector(nn.Module):
    """Two-layer MLP without biases: fc2(gelu(fc1(x))), (..., in_dim) to (..., out_dim).

    fc1 starts uniform(+-sqrt(3 / in_dim)), so that unit-variance input gives unit-variance hidden
    values; fc2 starts at zero, so that an untrained projector adds nothing to the stream. Weights
    are fp32 masters; outside autocast the product runs in the input's dtype.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or out_dim
        self.fc1 = nn.Linear(in_dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, out_dim, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        bound = math.sqrt(3.0 / self.fc1.in_features)
        self.fc1.weight.uniform_(-bound, bound, generator=generator)
        self.fc2.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.fc1.weight.to(x.dtype)))
        return F.linear(hidden, self.fc2.weight.to(hidden.dtype))
