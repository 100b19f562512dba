"""Order in which a stream brings bins: blocks of one rank's bins for several steps.

The ranks of a group read one stream, and block k of it is for rank k mod G of the group. A block of
one step would cost the stream's coordinator as much as one of many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Protocol

import numpy as np

from omni.plan.plan import EMPTY, Steps, padded_step


class PlannedBin(NamedTuple):
    """A bin of the stream: number of its split, and of the bin in its plan."""

    split: int
    bin: int


class BlockOrder(Protocol):
    """Blocks of a stream, by number."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    def block(self, number: int) -> list[PlannedBin]:
        """List the bins of a block."""


@dataclass(frozen=True)
class ListedBins:
    """Bins of one split, so many to a block."""

    bins: np.ndarray
    per_block: int = 1

    @property
    def blocks(self) -> int:
        return -(-len(self.bins) // self.per_block)

    def block(self, number: int) -> list[PlannedBin]:
        chosen = self.bins[number * self.per_block : (number + 1) * self.per_block]
        return [PlannedBin(0, bin) for bin in chosen.tolist()]


@dataclass(frozen=True)
class Ranks:
    """Ranks that read one stream, of `world` ranks in all."""

    world: int
    numbers: Sequence[int]

    @classmethod
    def all(cls, world: int) -> Ranks:
        return cls(world, range(world))


@dataclass(frozen=True)
class StreamOrder:
    """Blocks of the training steps from `first_step` on, with held-out bins after `held_step`.

    train: number of the training split. bins: bins of each split. bins_per_block: bins that a rank
    takes at a time. steps_per_block: steps to a block, a power of two. The first blocks hold one,
    one, two, four, ... steps, so that training does not wait longer for its first step.
    """

    train: int
    bins: tuple[int, ...]
    bins_per_step: int
    bins_per_block: int
    first_step: int
    held_step: int
    steps: int
    ranks: Ranks
    steps_per_block: int = 1

    @classmethod
    def of(
        cls,
        plans: Mapping[str, Steps],
        ranks: Ranks,
        bins_per_block: int,
        steps: tuple[int, int, int],
        steps_per_block: int = 1,
    ) -> StreamOrder:
        """Order the bins of plans, by split name. steps: the first, the held-out one, the end."""
        names = list(plans)
        return cls(
            names.index("train"),
            tuple(plan.bins for plan in plans.values()),
            plans["train"].bins_per_step,
            bins_per_block,
            *steps,
            ranks,
            steps_per_block,
        )

    @property
    def blocks(self) -> int:
        return sum(stretch.turns for stretch in self._stretches()) * len(self.ranks.numbers)

    def block(self, number: int) -> list[PlannedBin]:
        turn, member = divmod(number, len(self.ranks.numbers))
        stretches = self._stretches()
        ends = list(accumulate(stretch.turns for stretch in stretches))
        part, end = next(pair for pair in zip(stretches, ends, strict=True) if turn < pair[1])
        first, last = part.steps_of(turn - end + part.turns)
        rank, size = self.ranks.numbers[member], self.bins_per_block
        return [
            PlannedBin(part.split, bin)
            for step in range(first, last)
            for block in range(rank, part.width // size, self.ranks.world)
            for bin in planned_bins(step, block, part.per_step, size, part.bins)
        ]

    def all_bins(self) -> Iterator[PlannedBin]:
        """Iterate over the bins of all blocks."""
        for number in range(self.blocks):
            yield from self.block(number)

    def _stretches(self) -> list[_Stretch]:
        unit = self.ranks.world * self.bins_per_block
        width = padded_step(self.bins_per_step, self.ranks.world, self.bins_per_block)
        trained = (self.train, self.bins[self.train], self.bins_per_step, width)
        held = [(i, bins, unit, unit) for i, bins in enumerate(self.bins) if i != self.train]
        longest = self.steps_per_block
        return [
            _Stretch(*trained, self.first_step, self.held_step, longest, grows=True),
            *(_Stretch(*of_split, 0, -(-of_split[1] // unit), longest) for of_split in held),
            _Stretch(*trained, self.held_step, self.steps, longest),
        ]


@dataclass(frozen=True)
class _Stretch:
    """Steps of one split that follow each other.

    per_step: bins of a step, which is filled up to `width` with `EMPTY`.
    """

    split: int
    bins: int
    per_step: int
    width: int
    first: int
    last: int
    longest: int
    """Steps to a block."""
    grows: bool = False
    """Begins with shorter blocks."""

    @property
    def turns(self) -> int:
        """Number of blocks for each rank."""
        steps = max(0, self.last - self.first)
        if not self.grows:
            return -(-steps // self.longest)
        if steps <= self.longest:
            return 1 + (steps - 1).bit_length() if steps else 0
        return -(-steps // self.longest) + self.longest.bit_length() - 1

    def steps_of(self, number: int) -> tuple[int, int]:
        """Return the first step of a block, and the one after its last."""
        first, last = (self.first + self._start(n) for n in (number, number + 1))
        return first, min(last, self.last)

    def _start(self, number: int) -> int:
        growing = self.longest.bit_length()  # blocks of 1, 1, 2, ... steps up to the longest
        if not self.grows:
            return number * self.longest
        if number <= growing:
            return 1 << (number - 1) if number else 0
        return (number - growing + 1) * self.longest


def planned_bins(
    step: int, block: int, bins_per_step: int, bins_per_block: int, bins: int
) -> list[int]:
    """List the bins of a block of a step. block: its number among those of all ranks.

    A step is filled up with `EMPTY`, so that all ranks take equally many blocks, and its bins do
    not depend on the number of ranks. bins: bins of the split, after which all are `EMPTY`.
    """
    first, end = step * bins_per_step, min((step + 1) * bins_per_step, bins)
    numbers = range(first + block * bins_per_block, first + (block + 1) * bins_per_block)
    return [bin if bin < end else EMPTY for bin in numbers]


def count_streams(nodes: int, wanted: int | None, loaders: int, encoders: int | None) -> int:
    """Choose how many streams feed the ranks of so many nodes; each needs a loader and an encoder.

    wanted: `data.streams`; None: one for each node, or fewer where each is to have equally many
    encoders: ranks train in step, so the stream with the fewest is the pace of all. encoders: None
    where nothing is encoded.
    """
    limit = loaders if encoders is None else min(loaders, encoders)
    if wanted is None:
        wanted = nodes if encoders is None else math.gcd(nodes, encoders)
    return max(1, min(wanted, limit))


def rank_groups(nodes: Sequence[str], streams: int) -> list[list[int]]:
    """Divide ranks into groups, each with a stream of its own. nodes: that of each rank."""
    first_seen = {node: number for number, node in reversed(list(enumerate(nodes)))}
    ranks = sorted(range(len(nodes)), key=lambda rank: (first_seen[nodes[rank]], rank))
    if streams == len(first_seen):
        by_node = groupby(ranks, key=lambda rank: nodes[rank])
        return [list(of_node) for _, of_node in by_node]
    return [group.tolist() for group in np.array_split(ranks, min(streams, len(ranks)))]


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to `sizes`, with one for each at least."""
    rest = max(0, total - len(sizes))
    ends = [rest * end // sum(sizes) for end in accumulate(sizes)]
    return [1 + end - before for before, end in pairwise([0, *ends])]
