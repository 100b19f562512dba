"""nanochat's GPT, for packed sequences of text and soft tokens.

Rotary positions, QK norm, grouped heads, relu^2 MLP, value embeddings, smear, per-layer residual
scalars, backout, sliding windows and a logit softcap, with nanochat's initialisation and
state-dict names, so that its checkpoints fit. B batch, T positions, C = n_embd, H = n_head,
G = n_kv_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.model.packing import SegmentLayout

SOFTCAP = 15.0
ROTARY_BASE = 100_000.0
QK_SCALE = 1.2
VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24
LOGITS = 1 << 24  # fp32 logits of a chunk of the loss: 64 MiB


@dataclass(frozen=True)
class GPTConfig:
    """nanochat's `model_config`, field for field."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if (self.n_embd // self.n_head) % 2:
            raise ValueError(f"head width {self.n_embd // self.n_head} is odd; rotary needs pairs")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.n_embd < SMEAR_GATE_CHANNELS:
            raise ValueError(
                f"n_embd {self.n_embd} is under {SMEAR_GATE_CHANNELS} (the smear gate)"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern {self.window_pattern!r}: expected letters S and L")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    def windows(self) -> list[int]:
        """Left positions each layer sees besides itself; the last layer always sees all."""
        short = -(-(self.sequence_len // 4) // 128) * 128
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer)]
        letters[-1] = "L"
        return [short if letter == "S" else self.sequence_len for letter in letters]


def rms(x: Tensor) -> Tensor:
    """RMS normalisation over the last axis, without a weight."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BTHD: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding over half-split pairs, a rotation by minus theta as in nanochat."""
    cos, sin = cos_sin
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class KVCache:
    """Keys, values and the smear's last embedding of B sequences while they are decoded."""

    def __init__(self, config: GPTConfig, batch: int, capacity: int, like: Tensor) -> None:
        head = config.n_embd // config.n_head
        shape = (config.n_layer, batch, capacity, config.n_kv_head, head)
        self.k = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.v = torch.zeros_like(self.k)
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.last_embedding_BC: Tensor | None = None

    def store(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor, positions_BT: Tensor) -> None:
        rows = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
        self.k[layer][rows, positions_BT] = k_BTGD.to(self.k.dtype)
        self.v[layer][rows, positions_BT] = v_BTGD.to(self.v.dtype)


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
        layout: SegmentLayout,
        window: int,
        cache: KVCache | None,
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
        if cache is not None:
            cache.store(self.layer, k, v, layout.positions_BT)
        if cache is not None and length == 1:
            out = self._decode(q, cache, window)
        else:
            out = layout.attend(q, k, v, window)
        return self.c_proj(out.reshape(batch, length, width))

    def _decode(self, q_B1HD: Tensor, cache: KVCache, window: int) -> Tensor:
        """One new position per row against the cache, which already holds that position."""
        seen = int(cache.lengths_B.max()) + 1
        k, v = cache.k[self.layer][:, :seen], cache.v[self.layer][:, :seen]
        repeats = self.n_head // self.n_kv_head
        k, v = (t.repeat_interleave(repeats, dim=2).transpose(1, 2) for t in (k, v))
        distance = cache.lengths_B[:, None] - torch.arange(seen, device=k.device)
        visible = (distance >= 0) & (distance <= window)
        out = F.scaled_dot_product_attention(
            q_B1HD.transpose(1, 2), k, v, attn_mask=visible[:, None, None, :]
        )
        return out.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, has_value_embedding: bool) -> None:
        super().__init__()
        self.attn = Attention(config, layer, has_value_embedding)
        self.mlp = MLP(config.n_embd)


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig, with_value: list[int]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i, i in with_value) for i in range(config.n_layer))


class GPT(nn.Module):
    """nanochat's language model with a hook for soft tokens.

    dropout: on embeddings and on each residual branch, in training only (nanochat has none; small
    speech corpora need it).
    """

    def __init__(self, config: GPTConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        vocabulary, width = config.padded_vocab_size, config.n_embd
        kv_width = config.n_kv_head * (width // config.n_head)
        with_value = [i for i in range(config.n_layer) if i % 2 == (config.n_layer - 1) % 2]
        self.transformer = Transformer(config, with_value)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(vocabulary, kv_width) for i in with_value}
        )
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """nanochat's: embedding 0.8, matrices uniform of std 1/sqrt(C), outputs zero."""
        bound = math.sqrt(3.0 / self.config.n_embd)
        self.transformer.wte.weight.normal_(0.0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        for table in self.value_embeds.parameters():
            table.uniform_(-bound, bound, generator=generator)
        for block in self.blocks():
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound, generator=generator)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                block.attn.ve_gate.weight.uniform_(0.0, 0.02, generator=generator)
        self.smear_gate.weight.uniform_(0.0, 0.02, generator=generator)
        depth = torch.linspace(0, 1, self.config.n_layer)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    def blocks(self) -> list[Block]:
        return [block for block in self.transformer.h if isinstance(block, Block)]

    def embed(self, idx_BT: Tensor) -> Tensor:
        """Normed token embeddings (B, T, C): the place where soft tokens enter."""
        return rms(self.transformer.wte(idx_BT))

    def trunk(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor,
        layout: SegmentLayout,
        value_mask_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """All blocks over embeddings x: the normed final hidden states (B, T, C).

        value_mask_BT: False where a position has no token id (a soft token), hence no value
        embedding; None means every position has one.
        """
        if cache is not None and x_BTC.shape[1] > 1 and cache.last_embedding_BC is not None:
            raise ValueError("a cache that holds a prefix is continued one position at a time")
        previous = layout.shift(x_BTC)
        if cache is not None and x_BTC.shape[1] == 1 and cache.last_embedding_BC is not None:
            previous = cache.last_embedding_BC[:, None]
        if cache is not None:
            cache.last_embedding_BC = layout.last(x_BTC)
        gate = torch.sigmoid(self.smear_gate(x_BTC[..., :SMEAR_GATE_CHANNELS]))
        x = self._drop(x_BTC + self.smear_lambda * gate * previous)

        cos_sin = self._rotary(layout.positions_BT, x)
        x0, middle = x, x
        for i, (block, window) in enumerate(zip(self.blocks(), self.config.windows(), strict=True)):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = self._value(i, idx_BT, value_mask_BT)
            x = x + self._drop(block.attn(rms(x), value, cos_sin, layout, window, cache))
            x = x + self._drop(block.mlp(rms(x)))
            if i == self.config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.lengths_B = layout.next_positions()
        return rms(x - self.backout_lambda * middle)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped fp32 logits (..., V) of normed hidden states (..., C)."""
        raw = self.lm_head(hidden)[..., : self.config.vocab_size].float()
        return SOFTCAP * torch.tanh(raw / SOFTCAP)

    def loss(self, hidden_SC: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of S supervised positions, and how many are predicted rightly.

        Positions go through the vocabulary in chunks that are computed again for the backward pass,
        so that no more than `LOGITS` fp32 logits lie in memory.
        """
        size = max(1, LOGITS // self.config.padded_vocab_size)
        if len(targets_S) <= size:
            return self._loss(hidden_SC, targets_S)
        chunks = zip(hidden_SC.split(size), targets_S.split(size), strict=True)
        parts = [checkpoint(self._loss, h, t, use_reentrant=False) for h, t in chunks]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)

    def _loss(self, hidden_SC: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden_SC)
        loss = F.cross_entropy(logits, targets_S, reduction="sum")
        return loss, (logits.detach().argmax(-1) == targets_S).sum()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        segments: Tensor | None = None,
        kv_cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits (B, T, V) in fp32, or with targets the cross-entropy.

        idx, targets: (B, T) token ids; targets of -1 are ignored.
        audio_features: soft tokens already of width C. Without `audio_mask`, (B, N, C) is
        prepended to the text, LLaVA-style, and logits and targets cover N + T positions (targets
        of the audio are ignored). With `audio_mask` (B, T), (M, C) replaces the M masked positions
        in row-major order, whose ids are ignored.
        segments: (B, T) utterance numbers of a packed row, 0 for padding; nothing crosses from one
        to the next. None: each row is one sequence.
        """
        x = self.embed(idx)
        if audio_features is not None and audio_mask is None:
            batch, count = audio_features.shape[:2]
            x = torch.cat((audio_features.to(x.dtype), x), dim=1)
            idx = F.pad(idx, (count, 0))
            if targets is not None:
                targets = F.pad(targets, (count, 0), value=-1)
            audio_mask = torch.zeros_like(idx, dtype=torch.bool)
            audio_mask[:, :count] = True
            if segments is not None:
                raise ValueError("prepended audio_features and segments exclude each other")
        elif audio_features is not None and audio_mask is not None:
            x = scatter_soft_tokens(x, audio_features, audio_mask)
        if segments is not None:
            layout = SegmentLayout.packed(segments)
        else:
            start = kv_cache.lengths_B if kv_cache is not None else None
            layout = SegmentLayout.plain(idx.shape, idx.device, start)
        value_mask = None if audio_mask is None else ~audio_mask
        hidden = self.trunk(x, idx, layout, value_mask, kv_cache)
        if targets is None:
            return self.logits(hidden)
        if reduction not in ("mean", "sum"):
            logits = self.logits(hidden).flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=reduction)
        supervised = targets != -1
        loss, _ = self.loss(hidden[supervised], targets[supervised])
        return loss / supervised.sum() if reduction == "mean" else loss

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _value(self, layer: int, idx_BT: Tensor, mask_BT: Tensor | None) -> Tensor | None:
        if str(layer) not in self.value_embeds:
            return None
        value = self.value_embeds[str(layer)](idx_BT)
        if mask_BT is not None:
            value = value * mask_BT.unsqueeze(-1)
        return value.unflatten(-1, (self.config.n_kv_head, -1))

    def _rotary(self, positions_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        head = self.config.n_embd // self.config.n_head
        steps = torch.arange(0, head, 2, dtype=torch.float32, device=like.device)
        angles = positions_BT.float()[..., None] * ROTARY_BASE ** (-steps / head)
        dtype = (
            torch.get_autocast_dtype(like.device.type)
            if torch.is_autocast_enabled(like.device.type)
            else like.dtype
        )
        return angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]


def scatter_soft_tokens(x_BTC: Tensor, audio_MC: Tensor, mask_BT: Tensor) -> Tensor:
    """Put M soft tokens at the M True positions of mask, in row-major order."""
    flat = x_BTC.flatten(0, 1)
    where = mask_BT.flatten().nonzero().squeeze(1)
    return flat.index_copy(0, where, audio_MC.to(flat.dtype)).view_as(x_BTC)
