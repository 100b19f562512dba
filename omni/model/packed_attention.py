"""Causal attention over rows that hold several sequences (segments), each seeing only itself.

Three implementations compute the same result, which tests compare. On CPU, packed rows are split
into their segments, which attend in groups of similar length: matrix products for short segments,
torch's fused kernel for long ones; the cost is that of the segments, not the square of the row. On
a GPU, `flex_attention` runs over whole rows with a block mask, so that shapes stay fixed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# On CPU nothing of it is used, and its import takes a second.
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Literal["groups", "flex"]
GROUP_FILL = 0.7  # minimum ratio of the shortest to the longest segment of a group
_SHAPES = 256
"""Shapes for which a function may be compiled: of batches in training and evaluation."""
# Scores of longer sequences do not fit in the CPU's caches, and fused kernels are faster.
MATMUL_MAX_LENGTH = 512


@dataclass(frozen=True)
class SegmentLayout:
    """Positions and segment boundaries of a batch, for attention, smear and rotary embeddings."""

    positions_BT: Tensor
    """Distance from the start of the segment, int64."""
    continues_BT: Tensor
    """True where the previous position belongs to the same segment."""
    lengths_B: Tensor | None = None
    """Valid positions of plain rows that are padded on the right; None: all are valid."""
    groups: list[Tensor] | None = None
    """Kernel "groups": for each group, (S, L) flat positions of S segments, padded by repetition
    of their last position."""
    inverse: Tensor | None = None
    """Kernel "groups": index of each flat position in the concatenated groups; padding has the
    index one past the end."""
    segments_BT: Tensor | None = None
    """Kernel "flex": segment numbers, 0 is padding."""
    masks: dict[int, BlockMask] = field(default_factory=dict)
    """Kernel "flex": block masks by window, built on first use."""

    @classmethod
    def plain(
        cls,
        shape: torch.Size | tuple[int, int],
        device: torch.device,
        start_B: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> SegmentLayout:
        """Lay out rows of one sequence each, whose first position is `start_B` (default 0)."""
        steps = torch.arange(shape[1], device=device).expand(shape)
        positions = steps if start_B is None else steps + start_B[:, None]
        return cls(positions, steps > 0, lengths_B)

    @classmethod
    def packed(cls, segments_BT: Tensor, kernel: Kernel | None = None) -> SegmentLayout:
        """Lay out rows of several sequences, numbered by `segments_BT`; 0 is padding.

        kernel: None chooses "flex" on CUDA and "groups" elsewhere.
        """
        device = segments_BT.device
        if kernel is None:
            kernel = "flex" if device.type == "cuda" else "groups"
        steps = torch.arange(segments_BT.shape[1], device=device).expand(segments_BT.shape)
        continues = torch.zeros_like(segments_BT, dtype=torch.bool)
        continues[:, 1:] = segments_BT[:, 1:] == segments_BT[:, :-1]
        starts = torch.where(continues, 0, steps).cummax(dim=1).values
        positions, inside = steps - starts, continues & (segments_BT > 0)
        if kernel == "flex":
            return cls(positions, inside, segments_BT=segments_BT)
        groups, inverse = _group(segments_BT.cpu(), continues.cpu())
        return cls(
            positions,
            inside,
            groups=[group.to(device) for group in groups],
            inverse=inverse.to(device),
        )

    def shift(self, x_BTC: Tensor) -> Tensor:
        """Return x of the previous position, zero at the start of a segment."""
        shifted = F.pad(x_BTC, (0, 0, 1, 0))[:, :-1]
        return shifted * self.continues_BT.unsqueeze(-1)

    def last(self, x_BTC: Tensor) -> Tensor:
        """Return x at the last valid position of each plain row, (B, C)."""
        if self.lengths_B is None:
            return x_BTC[:, -1]
        return x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), self.lengths_B - 1]

    def next_positions(self) -> Tensor:
        """Return the position that follows each plain row, (B,) int64."""
        if self.lengths_B is None:
            return self.positions_BT[:, -1] + 1
        return self.positions_BT[:, 0] + self.lengths_B

    def fixed(self, window: int) -> FlexLayout:
        """Return what attention with one window needs of the layout, for kernel "flex"."""
        if self.segments_BT is None:
            raise ValueError("expected a layout for the kernel flex")
        if window not in self.masks:
            self.masks[window] = block_mask(self.segments_BT, window)
        return FlexLayout(self.masks[window])

    def attend(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        """Attend inside segments: each position sees itself and at most `window` to its left.

        Returns (B, T, H, D).
        """
        if self.segments_BT is not None:
            return self.fixed(window).attend(q_BTHD, k_BTGD, v_BTGD)
        if self.groups is None or self.inverse is None:
            return causal_attention(q_BTHD, k_BTGD, v_BTGD, window)
        if not self.groups:
            # The rows are all padding. DDP still needs a gradient for every trainable parameter.
            return q_BTHD * 0.0 + (k_BTGD.sum() + v_BTGD.sum()) * 0.0
        q, k, v = (t.flatten(0, 1) for t in (q_BTHD, k_BTGD, v_BTGD))
        outs = []
        for group in self.groups:
            picked = [
                t.index_select(0, group.flatten()).view(*group.shape, *t.shape[1:])
                for t in (q, k, v)
            ]
            outs.append(causal_attention(picked[0], picked[1], picked[2], window).flatten(0, 1))
        outs.append(torch.zeros(1, *q.shape[1:], dtype=v.dtype, device=v.device))
        return torch.cat(outs).index_select(0, self.inverse).view(q_BTHD.shape)


@dataclass(frozen=True)
class FlexLayout:
    """Block mask of packed rows for one window. Compiled layers take it as an input."""

    mask: BlockMask

    def attend(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int = 0) -> Tensor:
        """See `SegmentLayout.attend`; the window is that of the mask."""
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTGD, v_BTGD))
        # Inside a compiled layer it is part of the layer's graph.
        inside = torch.compiler.is_compiling()
        kernel: Any = flex_attention if inside else _flex_kernel(q.device.type)
        out: Tensor = kernel(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


def causal_attention(q_STHD: Tensor, k_STGD: Tensor, v_STGD: Tensor, window: int) -> Tensor:
    """Attend in S sequences of T positions, each seeing itself and at most `window` to its left.

    H query heads share G key heads. Returns (S, T, H, D).
    """
    length = q_STHD.shape[1]
    repeats = q_STHD.shape[2] // k_STGD.shape[2]
    if repeats > 1:
        k_STGD = k_STGD.repeat_interleave(repeats, dim=2)
        v_STGD = v_STGD.repeat_interleave(repeats, dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q_STHD, k_STGD, v_STGD))
    if q.device.type == "cpu" and length <= MATMUL_MAX_LENGTH:
        out = _matmul_attention(q, k, v, window)
    elif length <= window + 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(length, window, q.device))
    return out.transpose(1, 2)


def _matmul_attention(q_SHTD: Tensor, k_SHTD: Tensor, v_SHTD: Tensor, window: int) -> Tensor:
    """Attend by two batched matrix products and a softmax, (S, H, T, D).

    On CPU and for the lengths of utterances, torch 2.13's fused kernels take two to six times as
    long, forward and backward.
    """
    length, width = q_SHTD.shape[-2:]
    q, k, v = (t.reshape(-1, length, width) for t in (q_SHTD, k_SHTD, v_SHTD))
    mask = _additive_mask(length, min(window, length), q.dtype)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(width))
    return torch.bmm(scores.softmax(-1), v).view_as(q_SHTD)


@functools.lru_cache(maxsize=64)
def _additive_mask(length: int, window: int, dtype: torch.dtype) -> Tensor:
    """Build a mask of 0 at visible positions and -inf elsewhere, (T, T) on CPU."""
    with torch.inference_mode(False):
        visible = _visible(length, window, torch.device("cpu"))
        return torch.zeros(length, length, dtype=dtype).masked_fill_(~visible, -math.inf)


@contextlib.contextmanager
def separate_masks() -> Iterator[None]:
    """Share no cached mask with the calls outside the context: inside, tensors have no data."""
    _additive_mask.cache_clear()
    try:
        yield
    finally:
        _additive_mask.cache_clear()


def _visible(length: int, window: int, device: torch.device) -> Tensor:
    steps = torch.arange(length, device=device)
    distance = steps[:, None] - steps
    return (distance >= 0) & (distance <= window)


def block_mask(segments_BT: Tensor, window: int) -> BlockMask:
    """Build the mask of flex attention: causal, inside segments, at most `window` to the left."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = segments_BT.shape
    # As a tensor, all windows share a compiled kernel.
    left = torch.full((), window, device=segments_BT.device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = segments_BT[b, q] == segments_BT[b, k]
        return same & (q >= k) & (q - k <= left)

    return create_block_mask(visible, rows, None, length, length, device=segments_BT.device)


@functools.lru_cache(maxsize=2)
def _flex_kernel(device: str) -> Callable[..., Any]:
    """Return `flex_attention`, compiled to a fused kernel on CUDA; uncompiled it runs anywhere."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = flex_attention
    return compile_fully(kernel) if device == "cuda" else kernel


def compile_fully(
    function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """Compile a function anew for each shape, and raise an error where that is not possible.

    backend: torch's compiler. By default torch runs the function uncompiled from the ninth shape
    on, and says so in a log: attention would then store all scores.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    compiled: Callable[..., Any] = torch.compile(
        function, dynamic=False, fullgraph=True, backend=backend
    )
    return compiled


def _group(segments_BT: Tensor, continues_BT: Tensor) -> tuple[list[Tensor], Tensor]:
    """Sort segments by length and cut them into groups; see `SegmentLayout.groups`, `inverse`."""
    flat = segments_BT.flatten()
    begins = (~continues_BT.flatten()).nonzero().squeeze(1)
    ends = torch.cat((begins[1:], torch.tensor([flat.numel()])))
    real = flat[begins] > 0
    begins, lengths = begins[real], (ends - begins)[real]
    order = lengths.argsort(descending=True, stable=True)
    groups: list[Tensor] = []
    inverse = torch.full((flat.numel(),), -1, dtype=torch.long)
    offset, first = 0, 0
    while first < len(order):
        longest = int(lengths[order[first]])
        last = first
        while last < len(order) and lengths[order[last]] >= GROUP_FILL * longest:
            last += 1
        members = order[first:last]
        steps = torch.arange(longest)
        within = steps.clamp(max=lengths[members][:, None] - 1)
        positions = begins[members][:, None] + within
        indices = offset + torch.arange(positions.numel()).view_as(positions)
        valid = steps < lengths[members][:, None]
        inverse[positions[valid]] = indices[valid]
        groups.append(positions)
        offset += positions.numel()
        first = last
    inverse[inverse < 0] = offset
    return groups, inverse
