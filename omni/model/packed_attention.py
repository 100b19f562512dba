"""Several utterances in one row: who may look at whom, and attention that respects it.

The cost is that of the utterances, not the square of the bin. On CPU, packed rows are taken apart
into their segments, which attend in groups of similar length: nothing crosses a boundary because
the neighbours are not there. On a GPU shapes stay fixed, and a block mask skips what is not shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from omni.model.attention import causal, packed, packed_mask

Kernel = Literal["groups", "flex"]
GROUP_FILL = 0.7  # a group's shortest segment is at least this share of its longest


@dataclass(frozen=True)
class SegmentLayout:
    """What a batch's rows look like to attention, smear and rotary positions.

    positions_BT: distance from the segment's start.
    continues_BT: the position before belongs to the same segment.
    lengths_B: valid positions of plain rows that are padded on the right; None: all.
    groups: packed rows, "groups"; (S, L) flat positions of S segments, padded with their last one.
    inverse: each flat position's place in the concatenated groups; padding: one past the end.
    segments_BT: packed rows, "flex"; masks: their block masks by window, made when first needed.
    """

    positions_BT: Tensor
    continues_BT: Tensor
    lengths_B: Tensor | None = None
    groups: list[Tensor] | None = None
    inverse: Tensor | None = None
    segments_BT: Tensor | None = None
    masks: dict[int, BlockMask] = field(default_factory=dict)

    @classmethod
    def plain(
        cls,
        shape: torch.Size | tuple[int, int],
        device: torch.device,
        start_B: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> SegmentLayout:
        """Each row is one sequence, beginning at position `start_B` (0) and `lengths_B` long."""
        steps = torch.arange(shape[1], device=device).expand(shape)
        positions = steps if start_B is None else steps + start_B[:, None]
        return cls(positions, steps > 0, lengths_B)

    @classmethod
    def packed(cls, segments_BT: Tensor, kernel: Kernel | None = None) -> SegmentLayout:
        """Rows that hold several sequences, numbered by `segments_BT`; 0 is padding.

        kernel: how they attend; None is "flex" on CUDA and "groups" elsewhere.
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
        """x of the position before, zero where a segment begins."""
        shifted = F.pad(x_BTC, (0, 0, 1, 0))[:, :-1]
        return shifted * self.continues_BT.unsqueeze(-1)

    def last(self, x_BTC: Tensor) -> Tensor:
        """x at the last valid position of each plain row, (B, C)."""
        if self.lengths_B is None:
            return x_BTC[:, -1]
        return x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), self.lengths_B - 1]

    def next_positions(self) -> Tensor:
        """The position that follows each plain row, (B,)."""
        if self.lengths_B is None:
            return self.positions_BT[:, -1] + 1
        return self.positions_BT[:, 0] + self.lengths_B

    def attend(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        """Causal attention inside segments, each position seeing at most `window` to its left."""
        if self.segments_BT is not None:
            if window not in self.masks:
                self.masks[window] = packed_mask(self.segments_BT, window)
            return packed(q_BTHD, k_BTGD, v_BTGD, self.masks[window])
        if self.groups is None or self.inverse is None:
            return causal(q_BTHD, k_BTGD, v_BTGD, window)
        if not self.groups:
            # A bin of padding: nothing to attend to, but every parameter needs its gradient.
            return q_BTHD * 0.0 + (k_BTGD.sum() + v_BTGD.sum()) * 0.0
        q, k, v = (t.flatten(0, 1) for t in (q_BTHD, k_BTGD, v_BTGD))
        outs = []
        for group in self.groups:
            picked = [
                t.index_select(0, group.flatten()).view(*group.shape, *t.shape[1:])
                for t in (q, k, v)
            ]
            outs.append(causal(picked[0], picked[1], picked[2], window).flatten(0, 1))
        outs.append(torch.zeros(1, *q.shape[1:], dtype=v.dtype, device=v.device))
        return torch.cat(outs).index_select(0, self.inverse).view(q_BTHD.shape)


def _group(segments_BT: Tensor, continues_BT: Tensor) -> tuple[list[Tensor], Tensor]:
    """Segments sorted by length and cut into groups, with the way back."""
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
        places = offset + torch.arange(positions.numel()).view_as(positions)
        valid = steps < lengths[members][:, None]
        inverse[positions[valid]] = places[valid]
        groups.append(positions)
        offset += positions.numel()
        first = last
    inverse[inverse < 0] = offset
    return groups, inverse
