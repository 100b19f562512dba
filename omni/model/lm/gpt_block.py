"""Parts of nanochat's GPT: shape, attention, MLP and block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.model.lm.kv_cache import Cache
from omni.model.packed_attention import FlexLayout, SegmentLayout

ROTARY_BASE = 100_000.0
QK_SCALE = 1.2
VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; the fields are those of nanochat's `model_config`."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        # As nanochat does. The class is frozen.
        object.__setattr__(self, "window_pattern", self.window_pattern.upper())
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"n_embd {self.n_embd} / n_head {self.n_head} is odd; rotary embeddings need an "
                "even head width"
            )
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.n_embd < SMEAR_GATE_CHANNELS:
            raise ValueError(
                f"n_embd {self.n_embd}: expected {SMEAR_GATE_CHANNELS} or more (the smear gate)"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern {self.window_pattern!r}: expected letters S and L")

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    def windows(self) -> list[int]:
        """Return the left context of each layer in positions; the last layer always sees all."""
        short = -(-(self.sequence_len // 4) // 128) * 128
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer)]
        letters[-1] = "L"
        return [short if letter == "S" else self.sequence_len for letter in letters]


def rms(x: Tensor) -> Tensor:
    """Normalise the last axis to an RMS of 1, without a weight."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BTHD: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings to half-split pairs; as in nanochat, the angle is minus theta."""
    cos, sin = cos_sin
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, has_value_embedding: bool) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, self.n_head * self.head, bias=False)
        self.c_k = nn.Linear(config.n_embd, self.n_kv_head * self.head, bias=False)
        self.c_v = nn.Linear(config.n_embd, self.n_kv_head * self.head, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.ve_gate = (
            nn.Linear(VALUE_GATE_CHANNELS, self.n_kv_head, bias=False)
            if has_value_embedding
            else None
        )

    def forward(
        self,
        x_BTC: Tensor,
        value_BTGD: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
        layout: SegmentLayout | FlexLayout,
        window: int,
        cache: Cache | None,
    ) -> Tensor:
        batch, length, width = x_BTC.shape
        q = self.c_q(x_BTC).view(batch, length, self.n_head, self.head)
        k = self.c_k(x_BTC).view(batch, length, self.n_kv_head, self.head)
        v = self.c_v(x_BTC).view(batch, length, self.n_kv_head, self.head)
        if self.ve_gate is not None and value_BTGD is not None:
            gate = 3.0 * torch.sigmoid(self.ve_gate(x_BTC[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_BTGD.to(v.dtype)
        q = (rms(rotate(q, cos_sin)) * QK_SCALE).to(v.dtype)
        k = (rms(rotate(k, cos_sin)) * QK_SCALE).to(v.dtype)
        if cache is None:
            out = layout.attend(q, k, v, window)
        else:
            assert isinstance(layout, SegmentLayout)
            out = cache.attend(self.layer, q, k, v, layout, window)
        projected: Tensor = self.c_proj(out.reshape(batch, length, width))
        return projected


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.relu(self.c_fc(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, has_value_embedding: bool) -> None:
        super().__init__()
        self.attn = Attention(config, layer, has_value_embedding)
        self.mlp = MLP(config.n_embd)
        self.dropout = 0.0

    def forward(
        self,
        x_BTC: Tensor,
        first_BTC: Tensor,
        scale: Tensor,
        first_scale: Tensor,
        value_BTGD: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
        layout: SegmentLayout | FlexLayout,
        window: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the layer over x, scaled and with a share of the first layer's input."""
        x = scale * x_BTC + first_scale * first_BTC
        x = x + self._drop(self.attn(rms(x), value_BTGD, cos_sin, layout, window, cache))
        return x + self._drop(self.mlp(rms(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
