"""The layers of Whisper's audio encoder, over a packed batch of windows.

The windows of a batch are concatenated without padding into N frames; only attention separates
them. Parameter names are those of transformers' `WhisperEncoder`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.model.encoder.weights import WhisperConfig
from omni.model.precision import has_bf16

# Size of an attention tile in bf16 on CPU: the scores take 0.8 MB and stay in the L2 cache.
_TILE_QUERIES, _TILE_SCORES = 256, 400_000
# Torch's compiler calls it for a linear layer and its activation; builds without oneDNN lack it.
_FUSED = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class EncoderOutput(NamedTuple):
    """The output of transformers' encoders, as far as Whisper's users read it."""

    last_hidden_state: Tensor
    """(B, T_enc, d_model)"""


class WhisperTransformer(nn.Module):
    """Two convolutions, position embeddings, pre-norm transformer layers and a final LayerNorm.

    The parameters are frozen. state: None leaves them uninitialised, to be loaded later.
    """

    def __init__(self, config: WhisperConfig, state: dict[str, Tensor] | None) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        with contextlib.nullcontext() if state is None else torch.device("meta"):
            self.conv1 = nn.Conv1d(config.num_mel_bins, width, 3, padding=1)
            self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
            # Passing a weight skips an initialisation that would import torch's compiler.
            positions = (config.max_source_positions, width)
            self.embed_positions = nn.Embedding(*positions, _weight=torch.empty(positions))
            self.layers = nn.ModuleList(
                EncoderLayer(width, config.encoder_attention_heads, config.encoder_ffn_dim)
                for _ in range(config.encoder_layers)
            )
            self.layer_norm = nn.LayerNorm(width)
        if state is not None:
            self.load_state_dict(state, assign=True)
        self.requires_grad_(False)
        self.eval()

    def forward(self, input_features: Tensor) -> EncoderOutput:
        """Encode log-mels (B, n_mels, T_mel), T_mel even and at most 3000, one row at a time."""
        return EncoderOutput(pad_features(self.encode(list(input_features), padded=False)))

    @torch.inference_mode()
    def encode(
        self, mels: Sequence[Tensor], padded: bool, layer_ids: Sequence[int] = ()
    ) -> list[Tensor]:
        """Encode log-mels (n_mels, T) of windows, T even and at most 3000.

        padded: see `_Packing`. layer_ids: the hidden states to concatenate, each normalised; none
        returns the last one after the final LayerNorm. Returns (T // 2, d_model * max(1, ids))
        each. Raises ValueError for an odd T.
        """
        lengths = [mel.shape[1] // 2 for mel in mels]
        for mel in mels:
            if mel.shape[1] % 2:
                raise ValueError(f"expected an even number of frames, got {mel.shape[1]}")
        packing = _Packing(lengths, self.conv1.weight.device, padded)
        x = self._embed_padded(mels) if padded else self._embed_each(mels)
        hidden = [x]
        for layer in self.layers:
            x = layer(x, packing)
            if layer_ids:
                hidden.append(x)
        x = self.layer_norm(x)
        if layer_ids:
            hidden[-1] = x
            width = (self.config.d_model,)
            x = torch.cat([F.layer_norm(hidden[n], width) for n in layer_ids], -1)
        return list(torch.split(x, lengths))

    def _embed_each(self, mels: Sequence[Tensor]) -> Tensor:
        """Apply convolutions and positions to windows without padding them: (N, d_model).

        Both convolutions are matrix products of all windows at once. The windows lie one after
        another with a row of zeros before and after each, which is the padding of the first
        convolution. The row of its product before a window becomes that of the second one, which
        does not reach behind a window of even length. Rows across two windows are left out.
        """
        weight = self.conv1.weight
        lengths = [mel.shape[1] for mel in mels]
        starts = [0, *itertools.accumulate(length + 2 for length in lengths)]
        rows = starts.pop()
        # One row more at the start gives the product a row before the first window.
        padded = weight.new_zeros(rows + 3, mels[0].shape[0])
        for start, mel in zip(starts, mels, strict=True):
            padded[start + 2 : start + 2 + mel.shape[1]] = mel.T
        x = _product_gelu(padded, self.conv1, stride=1)
        x[torch.tensor(starts)] = 0
        x = _product_gelu(x, self.conv2, stride=2)
        positions = self.embed_positions.weight
        parts = []
        for start, length in zip(starts, lengths, strict=True):
            kept = x[start // 2 : (start + length) // 2]
            parts.append(kept + positions[: len(kept)])
        return torch.cat(parts)

    def _embed_padded(self, mels: Sequence[Tensor]) -> Tensor:
        """Apply convolutions and positions to all windows as one batch: (N, d_model).

        Lengths are even, so no kept frame depends on the padding.
        """
        weight = self.conv1.weight
        x = F.gelu(self.conv1(_sent(pad_mels(mels), weight.device).to(weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        return torch.cat([row[: mel.shape[1] // 2] for row, mel in zip(x, mels, strict=True)])


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer of Whisper, (N, d_model) to (N, d_model)."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width),
                "k_proj": nn.Linear(width, width, bias=False),
                "v_proj": nn.Linear(width, width),
                "out_proj": nn.Linear(width, width),
            }
        )
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x_NC: Tensor, packing: _Packing) -> Tensor:
        normed = self.self_attn_layer_norm(x_NC)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (self.heads, -1))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = packing.attend(q, k, v).flatten(1)
        x_NC = x_NC + self.self_attn["out_proj"](attended)
        hidden: Tensor = linear_gelu(self.final_layer_norm(x_NC), self.fc1.weight, self.fc1.bias)
        out: Tensor = x_NC + self.fc2(hidden)
        return out


class _Packing:
    """Attention inside the windows of a packed batch.

    padded False attends in one window at a time, which is fastest on CPU. True gathers all windows
    into one (windows, longest) batch, with a key mask only where lengths differ, for accelerators.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, padded: bool) -> None:
        self.lengths = list(lengths)
        self._padded = padded
        if padded:
            longest = max(lengths)
            counts = torch.tensor(self.lengths)
            valid_BL = torch.arange(longest) < counts[:, None]
            self._shape = (len(lengths), longest)
            self._indices_N = _sent(valid_BL.flatten().nonzero().squeeze(1), device)
            ragged = min(lengths) < longest
            self._mask = _sent(valid_BL[:, None, None, :], device) if ragged else None

    def attend(self, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        if not self._padded:
            parts = [torch.split(t, self.lengths) for t in (q_NHD, k_NHD, v_NHD)]
            return torch.cat([_attend_window(*window) for window in zip(*parts, strict=True)])
        q, k, v = (self._unpack(t).transpose(1, 2) for t in (q_NHD, k_NHD, v_NHD))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._indices_N)

    def _unpack(self, x_NHD: Tensor) -> Tensor:
        batch, longest = self._shape
        rows = x_NHD.new_zeros(batch * longest, *x_NHD.shape[1:])
        return rows.index_copy_(0, self._indices_N, x_NHD).view(batch, longest, *x_NHD.shape[1:])


def _product_gelu(rows: Tensor, convolution: nn.Conv1d, stride: int) -> Tensor:
    """Convolve (T, channels) rows, padded already, and apply GELU: (T', d_model)."""
    weight = convolution.weight.transpose(1, 2).flatten(1)
    count = (len(rows) - 3) // stride + 1
    shape, steps = (count, weight.shape[1]), (stride * rows.shape[1], 1)
    return linear_gelu(rows.as_strided(shape, steps), weight, convolution.bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute gelu(x @ weight.T + bias).

    In bf16 on CPU, oneDNN applies GELU to the sums in fp32, before they are rounded and stored.
    """
    in_bf16 = x.dtype == weight.dtype == torch.bfloat16  # Autocast has weights in fp32.
    if in_bf16 and x.device.type == "cpu" and has_bf16("cpu") and _FUSED is not None:
        return _FUSED(x.contiguous(), weight, bias, "gelu", [], "none")  # type: ignore[no-any-return]
    return F.gelu(F.linear(x, weight, bias))


def _attend_window(q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> Tensor:
    """Attend within one window, (L, H, D).

    In bf16 on CPU, torch 2.13's fused kernel takes 60 % longer than two matrix products over tiles
    whose scores stay in the L2 cache. In fp32 it is as fast, and what transformers calls.
    """
    q, k, v = (t.transpose(0, 1) for t in (q_LHD, k_LHD, v_LHD))
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
    heads, length, width = q.shape
    # Scaling the queries is exact: the scale is a power of two for Whisper's heads of width 64.
    queries = (q / math.sqrt(width)).contiguous()
    keys, values = k.contiguous().transpose(1, 2), v.contiguous()
    out = torch.empty_like(queries)
    rows = min(length, _TILE_QUERIES)
    heads_per_tile = max(1, _TILE_SCORES // (rows * length))
    for h in range(0, heads, heads_per_tile):
        tile = slice(h, h + heads_per_tile)
        for i in range(0, length, rows):
            scores = torch.bmm(queries[tile, i : i + rows], keys[tile])
            out[tile, i : i + rows] = torch.bmm(scores.softmax(-1), values[tile])
    return out.transpose(0, 1)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to `device`; the host does not wait for a GPU."""
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=True)


def pad_mels(mels: Sequence[Tensor]) -> Tensor:
    """Batch (n_mels, T) log-mels, zero-padded to the longest: (B, n_mels, max T) fp32."""
    batch = torch.zeros(len(mels), mels[0].shape[0], max(mel.shape[1] for mel in mels))
    for row, mel in enumerate(mels):
        batch[row, :, : mel.shape[1]] = mel
    return batch


def pad_features(features: Sequence[Tensor], length: int | None = None) -> Tensor:
    """Batch (T, d) features, zero-padded to `length` (default: the longest): (B, length, d).

    The result is a normal tensor, which autograd can save, even where the features were made in
    inference mode.
    """
    longest = max(map(len, features)) if length is None else length
    first = features[0]
    out = torch.zeros(
        len(features), longest, first.shape[1], dtype=first.dtype, device=first.device
    )
    for row, feature in enumerate(features):
        out[row, : len(feature)] = feature
    return out
