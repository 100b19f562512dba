"""Language models whose every part has an effect, small enough to check by hand."""

from __future__ import annotations

import torch
from torch import nn

from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig

# Grouped heads, short windows of 128 positions, and a vocabulary that is not a multiple of 64.
SMALL = GPTConfig(
    sequence_len=256,
    vocab_size=100,
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    n_embd=48,
    window_pattern="SSL",
)


@torch.no_grad()
def awaken(module: nn.Module, seed: int = 0) -> None:
    """Random values for all parameters: a fresh model has zero outputs, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lambda" in name:
            parameter.uniform_(0.2, 0.9, generator=generator)
        elif "gate" in name:
            parameter.normal_(0.0, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def awake_gpt(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    model = GPT(config).eval()
    awaken(model, seed)
    return model


def random_ids(*shape: int, seed: int = 1, vocab_size: int = SMALL.vocab_size) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def packed_row(lengths: list[int], positions: int) -> torch.Tensor:
    """Segments 1, 2, ... of the given lengths, then padding."""
    row = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    return torch.tensor([row + [0] * (positions - len(row))])
