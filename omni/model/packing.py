"""Several utterances in one row: who may look at whom, and attention that respects it.

Packed rows are taken apart into their segments, which attend causally in groups of similar length.
The cost is that of the utterances, not the square of the bin, and nothing crosses a boundary
because the neighbours are not there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

GROUP_FILL = 0.7  # a group's shortest segment is at least this share of its longest
SHORT_SEGMENT = 160


@dataclass(frozen=True)
class SegmentLayout:
    """What a batch's rows look like to attention, smear and rotary positions.

    positions_BT: distance from the segment's start.
    continues_BT: the position before belongs to the same segment.
    lengths_B: valid positions of plain rows that are padded on the right; None: all.
    groups: packed rows only; (S, L) flat positions of S segments, padded with their last one.
    inverse: each flat position's place in the concatenated groups; padding: one past the end.
    """

    positions_BT: Tensor
    continues_BT: Tensor
    lengths_B: Tensor | None = None
    groups: list[Tensor] | None = None
    inverse: Tensor | None = None

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
    def packed(cls, segments_BT: Tensor) -> SegmentLayout:
        """Rows that hold several sequences, numbered by `segments_BT`; 0 is padding."""
        device = segments_BT.device
        steps = torch.arange(segments_BT.shape[1], device=device).expand(segments_BT.shape)
        continues = torch.zeros_like(segments_BT, dtype=torch.bool)
        continues[:, 1:] = segments_BT[:, 1:] == segments_BT[:, :-1]
        starts = torch.where(continues, 0, steps).cummax(dim=1).values
        groups, inverse = _group(segments_BT.cpu(), continues.cpu())
        return cls(
            steps - starts,
            continues & (segments_BT > 0),
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
        if self.groups is None or self.inverse is None:
            return _causal(q_BTHD, k_BTGD, v_BTGD, window)
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
            outs.append(_causal(picked[0], picked[1], picked[2], window).flatten(0, 1))
        outs.append(torch.zeros(1, *q.shape[1:], dtype=v.dtype, device=v.device))
        return torch.cat(outs).index_select(0, self.inverse).view(q_BTHD.shape)


def _causal(q_STHD: Tensor, k_STGD: Tensor, v_STGD: Tensor, window: int) -> Tensor:
    length = q_STHD.shape[1]
    repeats = q_STHD.shape[2] // k_STGD.shape[2]
    if repeats > 1:
        k_STGD = k_STGD.repeat_interleave(repeats, dim=2)
        v_STGD = v_STGD.repeat_interleave(repeats, dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q_STHD, k_STGD, v_STGD))
    if length <= window + 1:
        with _kernel(q, length):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        steps = torch.arange(length, device=q.device)
        distance = steps[:, None] - steps
        band = (distance >= 0) & (distance <= window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    return out.transpose(1, 2)


def _kernel(q: Tensor, length: int) -> AbstractContextManager[None]:
    """On CPU the fused kernel's fixed cost exceeds the whole product for short segments."""
    if q.device.type == "cpu" and length <= SHORT_SEGMENT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


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
