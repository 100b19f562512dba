"""nanochat's GPT, for packed sequences of text and soft tokens.

Rotary positions, QK norm, grouped heads, relu^2 MLP, value embeddings, smear, per-layer residual
scalars, backout, sliding windows and a logit softcap, with nanochat's initialisation and
state-dict names, so that its checkpoints fit. B batch, T positions, C = n_embd, H = n_head,
G = n_kv_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni.model.lm.gpt_block import (
    ROTARY_BASE,
    SMEAR_GATE_CHANNELS,
    Block,
    GPTConfig,
    rms,
)
from omni.model.lm.kv_cache import Cache, KVCache
from omni.model.losses import token_losses
from omni.model.packed_attention import FlexLayout, SegmentLayout, compile_fully
from omni.model.shards import copy_, normal_, uniform_

SOFTCAP = 15.0


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig, with_value: list[int]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i, i in with_value) for i in range(config.n_layer))


class GPT(nn.Module):
    """nanochat's language model, with soft tokens as additional input.

    dropout: on embeddings and on each residual branch, in training only. nanochat has none; small
    speech corpora need it.
    """

    def __init__(self, config: GPTConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self._recompute = False
        self._compiled: Callable[..., Tensor] | None = None
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
        self.dropout = dropout
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise as nanochat: embeddings of std 0.8, matrices uniform of std 1/sqrt(C), output
        matrices of branches zero.
        """
        bound = math.sqrt(3.0 / self.config.n_embd)
        normal_(self.transformer.wte.weight, 0.0, 0.8, generator)
        normal_(self.lm_head.weight, 0.0, 0.001, generator)
        for table in self.value_embeds.parameters():
            uniform_(table, -bound, bound, generator)
        for block in self.blocks():
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform_(linear.weight, -bound, bound, generator)
            uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound, generator)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                uniform_(block.attn.ve_gate.weight, 0.0, 0.02, generator)
        uniform_(self.smear_gate.weight, 0.0, 0.02, generator)
        depth = torch.linspace(0, 1, self.config.n_layer)
        copy_(self.resid_lambdas, 1.15 - 0.10 * depth)
        copy_(self.x0_lambdas, 0.20 - 0.15 * depth)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    @property
    def dropout(self) -> float:
        """Rate of dropout on embeddings and residual branches."""
        return self._dropout

    @dropout.setter
    def dropout(self, rate: float) -> None:
        self._dropout = rate
        for block in self.blocks():
            block.dropout = rate

    def blocks(self) -> list[Block]:
        return [block for block in self.transformer.h if isinstance(block, Block)]

    def head(self) -> nn.Linear:
        """Return the layer that computes the logits."""
        return self.lm_head

    def embedding_matrix(self) -> Tensor:
        """Return the token embeddings (V, C) as stored."""
        return self.transformer.wte.weight

    def embed(self, idx_BT: Tensor) -> Tensor:
        """Compute normed token embeddings (B, T, C), among which soft tokens are inserted."""
        return rms(self.transformer.wte(idx_BT))

    def trunk(
        self,
        x_BTC: Tensor,
        idx_BT: Tensor,
        layout: SegmentLayout,
        value_mask_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run all blocks over embeddings x; returns normed final hidden states (B, T, C).

        value_mask_BT: False where a position has no token id (a soft token), hence no value
        embedding; None means every position has one.
        """
        previous = layout.shift(x_BTC) if cache is None else cache.previous(x_BTC, layout)
        gate = torch.sigmoid(self.smear_gate(x_BTC[..., :SMEAR_GATE_CHANNELS]))
        x = self._drop(x_BTC + self.smear_lambda * gate * previous)

        cos_sin = self._rotary(layout.positions_BT, x)
        x0, middle = x, x
        compiled = self._compiled if self.training and cache is None else None
        if layout.segments_BT is None:
            compiled = None
        if compiled is not None:
            x0 = x.clone()  # The compiler would make a graph of its own for a layer with x as x0.
        for i, (block, window) in enumerate(zip(self.blocks(), self.config.windows(), strict=True)):
            scales = (self.resid_lambdas[i], self.x0_lambdas[i])
            value = self._value(i, idx_BT, value_mask_BT)
            run: Callable[..., Tensor]
            if compiled is not None:
                run = functools.partial(compiled, block, layout=layout.fixed(window))
            else:
                run = functools.partial(block, layout=layout, window=window, cache=cache)
            arguments = (x, x0, *scales, value, cos_sin)
            if self._recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(run, *arguments, use_reentrant=False)
            else:
                x = run(*arguments)
            if i == self.config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.advance(x_BTC, layout)
        return rms(x - self.backout_lambda * middle)

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the layers' computation in training, whose shapes are few.

        backend: torch's compiler. Layers share one compiled graph, or two where some have value
        embeddings. Evaluation and decoding, whose shapes vary, stay as they are.
        """
        self._compiled = compile_fully(_run_block, backend)

    def recompute(self) -> None:
        """Store only the inputs of layers, and recompute activations in the backward pass."""
        self._recompute = True

    def shards(self) -> list[nn.Module]:
        """List the modules that FSDP gathers one at a time: attention and MLP of each block, which
        the trunk calls separately.
        """
        return [half for block in self.blocks() for half in (block.attn, block.mlp)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute softcapped fp32 logits (..., V) of normed hidden states (..., C)."""
        raw = self.lm_head(hidden)[..., : self.config.vocab_size].float()
        return SOFTCAP * torch.tanh(raw / SOFTCAP)

    def loss(self, hidden_SC: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cross-entropy (S,) fp32 and correctness (S,) bool of S supervised positions."""
        return token_losses(self.logits, self.config.padded_vocab_size, hidden_SC, targets_S)

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
        """Compute fp32 logits (B, T, V), or with targets the cross-entropy.

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
                raise ValueError("audio_features with segments: expected audio_mask")
        elif audio_features is not None and audio_mask is not None:
            at = audio_mask.flatten().nonzero().squeeze(1)
            x = scatter_soft_tokens(x, audio_features, at)
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
        losses, _ = self.loss(hidden[supervised], targets[supervised])
        return losses.mean() if reduction == "mean" else losses.sum()

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _value(self, layer: int, idx_BT: Tensor, mask_BT: Tensor | None) -> Tensor | None:
        if str(layer) not in self.value_embeds:
            return None
        value: Tensor = self.value_embeds[str(layer)](idx_BT)
        if mask_BT is not None:
            value = value * mask_BT.unsqueeze(-1)
        heads: Tensor = value.unflatten(-1, (self.config.n_kv_head, -1))
        return heads

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


def scatter_soft_tokens(x_BTC: Tensor, audio_MC: Tensor, at_M: Tensor) -> Tensor:
    """Put M soft tokens at M positions, counted through the rows."""
    flat = x_BTC.flatten(0, 1)
    return flat.index_copy(0, at_M, audio_MC.to(flat.dtype)).view_as(x_BTC)


def _run_block(block: Block, *arguments: Any, layout: FlexLayout) -> Tensor:
    """Call a layer. Compiled, it takes the layer as an input, so that layers share a graph."""
    out: Tensor = block(*arguments, layout=layout)
    return out
