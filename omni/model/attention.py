"""Causal attention with a window, by whatever the device does best.

Three ways to one result (tests compare them): a few matrix products on CPU, torch's fused kernels,
and `flex_attention` over packed rows, whose block mask skips what no utterance shares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

CPU_LENGTH = 512  # longer sequences: scores would leave the caches, fused kernels win


def causal(q_STHD: Tensor, k_STGD: Tensor, v_STGD: Tensor, window: int) -> Tensor:
    """S sequences of T positions, each seeing itself and at most `window` to its left.

    H query heads share G key heads. Returns (S, T, H, D).
    """
    length = q_STHD.shape[1]
    repeats = q_STHD.shape[2] // k_STGD.shape[2]
    if repeats > 1:
        k_STGD = k_STGD.repeat_interleave(repeats, dim=2)
        v_STGD = v_STGD.repeat_interleave(repeats, dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q_STHD, k_STGD, v_STGD))
    if q.device.type == "cpu" and length <= CPU_LENGTH:
        out = _by_products(q, k, v, window)
    elif length <= window + 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(length, window, q.device))
    return out.transpose(1, 2)


def _by_products(q_SHTD: Tensor, k_SHTD: Tensor, v_SHTD: Tensor, window: int) -> Tensor:
    """Scores as one product with the mask added to it. On CPU, torch 2.13's fused kernels take two
    to six times as long, forwards and backwards, for the lengths of utterances."""
    length, width = q_SHTD.shape[-2:]
    q, k, v = (t.reshape(-1, length, width) for t in (q_SHTD, k_SHTD, v_SHTD))
    mask = _mask(length, min(window, length), q.dtype)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(width))
    return torch.bmm(scores.softmax(-1), v).view_as(q_SHTD)


@functools.lru_cache(maxsize=64)
def _mask(length: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a position is seen and -inf elsewhere, (T, T) on CPU."""
    with torch.inference_mode(False):
        visible = _visible(length, window, torch.device("cpu"))
        return torch.zeros(length, length, dtype=dtype).masked_fill_(~visible, -math.inf)


def _visible(length: int, window: int, device: torch.device) -> Tensor:
    steps = torch.arange(length, device=device)
    distance = steps[:, None] - steps
    return (distance >= 0) & (distance <= window)


def packed_mask(segments_BT: Tensor, window: int) -> BlockMask:
    """Which blocks of packed rows look at which, for `packed`. Built once per batch and window."""
    rows, length = segments_BT.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = segments_BT[b, q] == segments_BT[b, k]
        return same & (q >= k) & (q - k <= window)

    return create_block_mask(visible, rows, None, length, length, device=segments_BT.device)


def packed(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, mask: BlockMask) -> Tensor:
    """Attention inside the segments of packed rows, (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTGD, v_BTGD))
    grouped = q.shape[1] != k.shape[1]
    out = _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=2)
def _flex(device: str) -> Callable[..., Any]:
    """Compiled, it is a fused kernel; without a compiler it is a reference that runs anywhere."""
    kernel: Any = flex_attention
    return torch.compile(kernel, dynamic=False) if device == "cuda" else kernel
