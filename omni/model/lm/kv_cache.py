"""Keys and values that attention reads instead of computing them again, for GPT and transformers.

B rows, T new positions, H query heads, G key heads, D head width, L positions held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.model.packed_attention import SegmentLayout

_STEP = 64
"""Positions by which the memory of a cache grows."""


class Cache(Protocol):
    """Keys and values of earlier positions, as a language model's trunk uses them."""

    def previous(self, x_BTC: Tensor, layout: SegmentLayout) -> Tensor:
        """Return the embedding before each new position, zero at the start of a sequence."""

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        layout: SegmentLayout,
        window: int,
    ) -> Tensor:
        """Attend from the new positions to those held and to each other; returns (B, T, H, D)."""

    def advance(self, x_BTC: Tensor, layout: SegmentLayout) -> None:
        """Count the new positions as held, after the last layer."""


class KVCache:
    """Keys and values of B sequences that grow, by a prompt at first, then by one position a call.

    Memory follows the longest sequence that it holds.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.keys: list[Tensor] = []
        """Of each layer, (B, G, L, D)."""
        self.values: list[Tensor] = []
        self.lengths_B: Tensor | None = None
        """Positions that each row holds; None: no row holds any."""
        self.longest = 0
        """Positions that any row may hold, known without asking the device."""
        self._last_embedding_BC: Tensor | None = None
        self._masks: dict[int, Tensor] = {}

    def previous(self, x_BTC: Tensor, layout: SegmentLayout) -> Tensor:
        """See `Cache`."""
        if self._last_embedding_BC is None:
            return layout.shift(x_BTC)
        if x_BTC.shape[1] > 1:
            raise ValueError("KV cache that holds a prefix: expected one position per call")
        return self._last_embedding_BC[:, None]

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        layout: SegmentLayout,
        window: int,
    ) -> Tensor:
        """See `Cache`."""
        length = k_BTGD.shape[1]
        self._reserve(layer, self.longest + length, k_BTGD)
        keys, values = self.keys[layer], self.values[layer]
        if self.lengths_B is None:
            keys[:, :, :length], values[:, :, :length] = (
                k_BTGD.transpose(1, 2),
                v_BTGD.transpose(1, 2),
            )
            return layout.attend(q_BTHD, k_BTGD, v_BTGD, window)
        rows = torch.arange(self.batch, device=keys.device)
        keys[rows, :, self.lengths_B] = k_BTGD[:, 0].to(keys.dtype)
        values[rows, :, self.lengths_B] = v_BTGD[:, 0].to(values.dtype)
        seen = self.longest + 1
        # Query heads that share a key head are rows of one product, so that no key is copied.
        grouped = q_BTHD.reshape(self.batch, keys.shape[1], -1, keys.shape[3])
        scores = grouped.to(keys.dtype) @ keys[:, :, :seen].transpose(2, 3)
        scores = scores.float() * (1 / math.sqrt(keys.shape[3])) + self._mask(window, seen)
        out = scores.softmax(-1).to(values.dtype) @ values[:, :, :seen]
        return out.reshape(q_BTHD.shape)

    def _mask(self, window: int, seen: int) -> Tensor:
        """Build what hides positions from a row, (B, 1, 1, L): 0 where it sees them, else -inf."""
        if window not in self._masks:
            assert self.lengths_B is not None
            steps = torch.arange(seen, device=self.lengths_B.device)
            distance = self.lengths_B[:, None] - steps
            mask = torch.zeros_like(distance, dtype=torch.float32)
            mask = mask.masked_fill((distance < 0) | (distance > window), -math.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def _reserve(self, layer: int, positions: int, like_BTGD: Tensor) -> None:
        """Make room for positions in a layer."""
        room = -(-positions // _STEP) * _STEP
        if layer == len(self.keys):
            shape = (self.batch, like_BTGD.shape[2], room, like_BTGD.shape[3])
            self.keys.append(like_BTGD.new_zeros(shape))
            self.values.append(like_BTGD.new_zeros(shape))
        missing = room - self.keys[layer].shape[2]
        if missing > 0:
            self.keys[layer] = F.pad(self.keys[layer], (0, 0, 0, missing))
            self.values[layer] = F.pad(self.values[layer], (0, 0, 0, missing))

    def advance(self, x_BTC: Tensor, layout: SegmentLayout) -> None:
        """See `Cache`."""
        self._last_embedding_BC = layout.last(x_BTC)
        self.lengths_B = layout.next_positions()
        self.longest += x_BTC.shape[1]
        self._masks.clear()

    def take(self, rows_K: Tensor) -> None:
        """Keep the rows given, in that order; one may be given several times."""
        self.batch = len(rows_K)
        self.keys = [layer.index_select(0, rows_K) for layer in self.keys]
        self.values = [layer.index_select(0, rows_K) for layer in self.values]
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B.index_select(0, rows_K)
        if self._last_embedding_BC is not None:
            self._last_embedding_BC = self._last_embedding_BC.index_select(0, rows_K)
        self._masks.clear()

    def put(self, rows_K: Tensor, other: KVCache) -> None:
        """Put the rows of another cache in the place of some of these."""
        assert self._last_embedding_BC is not None and other._last_embedding_BC is not None
        for layer, (keys, values) in enumerate(zip(other.keys, other.values, strict=True)):
            self._reserve(layer, other.longest, keys.transpose(1, 2))
            held = slice(0, other.longest)
            self.keys[layer][:, :, held].index_copy_(0, rows_K, keys[:, :, held])
            self.values[layer][:, :, held].index_copy_(0, rows_K, values[:, :, held])
        self._last_embedding_BC = self._last_embedding_BC.index_copy(
            0, rows_K, other._last_embedding_BC
        )

    def widen(self, batch: int) -> None:
        """Add empty rows, up to so many in all."""
        more = (0, 0, 0, 0, 0, 0, 0, batch - self.batch)
        self.keys = [F.pad(layer, more) for layer in self.keys]
        self.values = [F.pad(layer, more) for layer in self.values]
        if self._last_embedding_BC is not None:
            self._last_embedding_BC = F.pad(self._last_embedding_BC, (0, 0, 0, batch - self.batch))
        if self.lengths_B is not None:
            self.lengths_B = F.pad(self.lengths_B, (0, batch - self.batch))
        self.batch = batch

    def set_lengths(self, lengths: Sequence[int], device: torch.device) -> None:
        """Say how many positions each row holds; rows in which nothing is continued hold none."""
        self.lengths_B = torch.tensor(list(lengths), device=device)
        self.longest = max(lengths)
        self._masks.clear()

    def row(self, row: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
        """Copy keys and values (G, length, D) of each layer of a row."""
        keys = [layer[row, :, :length].clone() for layer in self.keys]
        return keys, [layer[row, :, :length].clone() for layer in self.values]


class TreeCache:
    """Keys and values of prefixes that trees of tokens continue, each position seeing its path.

    Several continuations of a prefix are read in one call, without a copy of the prefix, or of
    their common beginnings, for each.
    """

    def __init__(
        self,
        prefixes: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
        previous_BTC: Tensor,
        paths_BTS: Tensor,
        distances_BTS: Tensor,
    ) -> None:
        """prefixes: keys and values (G, P, D) by layer, of each row. previous_BTC: embedding before
        each position. paths_BTS: True where a position sees one of the L positions of the longest
        prefix, or of the T new ones after them, at a distance of `distances_BTS`."""
        self._keys = [_padded(layer) for layer in zip(*(keys for keys, _ in prefixes), strict=True)]
        self._values = [_padded(layer) for layer in zip(*(v for _, v in prefixes), strict=True)]
        self._previous_BTC = previous_BTC
        self._paths_BTS, self._distances_BTS = paths_BTS, distances_BTS

    def previous(self, x_BTC: Tensor, layout: SegmentLayout) -> Tensor:
        """See `Cache`."""
        return self._previous_BTC

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        layout: SegmentLayout,
        window: int,
    ) -> Tensor:
        """See `Cache`."""
        keys = torch.cat((self._keys[layer].to(k_BTGD.dtype), k_BTGD.transpose(1, 2)), 2)
        values = torch.cat((self._values[layer].to(v_BTGD.dtype), v_BTGD.transpose(1, 2)), 2)
        repeats = q_BTHD.shape[2] // keys.shape[1]
        if repeats > 1:
            keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
        visible = self._paths_BTS & (self._distances_BTS <= window)
        out = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2).to(keys.dtype), keys, values, attn_mask=visible[:, None]
        )
        return out.transpose(1, 2)

    def advance(self, x_BTC: Tensor, layout: SegmentLayout) -> None:
        """See `Cache`: the prefixes stay as they are."""


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Stack (G, P, D) of several rows to (B, G, L, D)."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
