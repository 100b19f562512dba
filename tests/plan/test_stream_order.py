"""The order of a stream: every bin once, for any ranks, groups of ranks and size of blocks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from

from omni.plan.plan import EMPTY, Steps, held_out_step, padded_step
from omni.plan.stream_order import (
    ListedBins,
    PlannedBin,
    Ranks,
    StreamOrder,
    apportion,
    count_streams,
    planned_bins,
    rank_groups,
)

CLUSTERS = [(1, 1), (2, 1), (3, 2), (4, 1), (2, 4)]
PER_STEP, STEPS = 5, 9


class _Plan(Steps):
    def __init__(self, bins: int) -> None:
        self._bins, self.bins_per_step = bins, PER_STEP
        self.epoch_ends = np.asarray([bins])

    @property
    def bins(self) -> int:
        return self._bins


def _order(
    ranks: Ranks,
    per_block: int,
    *,
    bins: int = PER_STEP * STEPS,
    held: int = 7,
    steps: tuple[int, int, int] = (0, 3, STEPS),
    steps_per_block: int = 1,
) -> StreamOrder:
    plans = {"dev": _Plan(held), "train": _Plan(bins)}
    return StreamOrder.of(plans, ranks, per_block, steps, steps_per_block)


def _of_rank(order: StreamOrder, rank: int) -> list[PlannedBin]:
    """Join the blocks of a rank, as Ray Data deals them out."""
    group = list(order.ranks.numbers)
    numbers = range(group.index(rank), order.blocks, len(group))
    return [one for number in numbers for one in order.block(number)]


@pytest.mark.parametrize("world, per_block", CLUSTERS)
def test_a_rank_gets_the_bins_that_it_expects(world: int, per_block: int) -> None:
    order = _order(Ranks.all(world), per_block)
    for rank in range(world):
        planned = iter(_of_rank(order, rank))
        for step in range(STEPS):
            if step == 3:
                held = [next(planned) for _ in range(padded_step(7, world, per_block) // world)]
                assert {one.split for one in held} == {0}
            for block in range(rank, padded_step(PER_STEP, world, per_block) // per_block, world):
                for bin in planned_bins(step, block, PER_STEP, per_block, PER_STEP * STEPS):
                    assert next(planned) == (1, bin)
        assert next(planned, None) is None


@pytest.mark.parametrize("world, per_block", CLUSTERS)
@pytest.mark.parametrize("steps_per_block", [1, 2, 8])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_groups_and_longer_blocks_change_no_ranks_bins(
    world: int, per_block: int, steps_per_block: int, first: int
) -> None:
    steps = (first, min(first + 3, STEPS), STEPS)
    whole = _order(Ranks.all(world), per_block, steps=steps)
    seen = []
    for group in np.array_split(np.arange(world), min(2, world)):
        ranks = Ranks(world, group.tolist())
        order = _order(ranks, per_block, steps=steps, steps_per_block=steps_per_block)
        for rank in ranks.numbers:
            assert _of_rank(order, rank) == _of_rank(whole, rank)
            seen += _of_rank(order, rank)
    trained = sorted(bin for split, bin in seen if split == 1 and bin != EMPTY)
    assert trained == list(range(first * PER_STEP, STEPS * PER_STEP))
    assert sorted(bin for split, bin in seen if split == 0 and bin != EMPTY) == list(range(7))


@given(steps=integers(0, 100), longest=sampled_from([1, 2, 4, 16]), held=integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_blocks_grow_to_their_size_and_end_with_their_part(
    steps: int, longest: int, held: int
) -> None:
    held = min(held, steps)
    order = _order(
        Ranks.all(2),
        1,
        bins=PER_STEP * 100,
        held=0,
        steps=(0, held, steps),
        steps_per_block=longest,
    )
    width = padded_step(PER_STEP, 2, 1) // 2
    sizes = [len(order.block(number)) // width for number in range(order.blocks)]
    assert sizes[::2] == sizes[1::2], "ranks take turns only where blocks are equally long"
    assert sum(sizes[::2]) == steps
    assert sizes[::2] == [*_lengths(held, longest, True), *_lengths(steps - held, longest, False)]


def _lengths(steps: int, longest: int, grows: bool) -> list[int]:
    """Cut steps into blocks of 1, 1, 2, 4, ... up to `longest`, or of `longest` at once."""
    lengths, following = [], [1, *(1 << n for n in range(longest.bit_length()))] if grows else []
    while steps:
        lengths.append(min(following.pop(0) if following else longest, steps))
        steps -= lengths[-1]
    return lengths


def test_the_number_of_blocks_is_known_without_listing_them() -> None:
    order = _order(Ranks.all(8), 1, bins=10**12, steps=(10, 100, 10**11), steps_per_block=16)
    assert order.blocks > 10**10
    assert order.block(order.blocks - 1)[-1].bin == EMPTY
    assert order.block(order.blocks - 8)[-1].bin == PER_STEP * (10**11 - 1)


def test_steps_past_the_end_of_the_plan_are_empty() -> None:
    bins = PER_STEP * STEPS - 3
    order = _order(Ranks.all(2), 1, bins=bins, held=0, steps=(0, 0, STEPS + 2))
    width = padded_step(PER_STEP, 2, 1)
    rows = np.asarray([one.bin for one in order.all_bins()]).reshape(STEPS + 2, width)
    assert rows.max() == bins - 1
    assert (rows[STEPS - 1] == EMPTY).any() and (rows[STEPS:] == EMPTY).all()
    assert _order(Ranks.all(2), 1, held=0, steps=(2, 2, 2)).blocks == 0


def test_held_out_bins_come_before_the_first_evaluation() -> None:
    order = _order(Ranks.all(1), 1, steps=(2, held_out_step(2, STEPS, 50, 4), STEPS))
    splits = [one.split for one in order.all_bins()]
    assert splits.index(0) == (4 - 2) * PER_STEP


def test_listed_bins_fill_blocks_in_order() -> None:
    order = ListedBins(np.arange(3, 10), 3)
    blocks = [[one.bin for one in order.block(number)] for number in range(order.blocks)]
    assert blocks == [[3, 4, 5], [6, 7, 8], [9]]


# -- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nodes, wanted, loaders, encoders, expected",
    [
        (2, None, 8, 8, 2),
        (8, None, 8, 16, 8),
        (8, None, 8, 12, 4),  # three encoders each
        (8, None, 16, 7, 1),
        (8, None, 4, 16, 4),
        (8, None, 8, None, 8),  # nothing is encoded
        (1, 2, 8, 8, 2),
        (1, 5, 2, 8, 2),
        (4, 4, 8, 3, 3),
    ],
)
def test_streams_have_equally_many_encoders(
    nodes: int, wanted: int | None, loaders: int, encoders: int | None, expected: int
) -> None:
    assert count_streams(nodes, wanted, loaders, encoders) == expected


@pytest.mark.parametrize(
    "nodes, streams, expected",
    [
        ("aabb", 2, [[0, 1], [2, 3]]),
        ("abab", 2, [[0, 2], [1, 3]]),
        ("aabb", 1, [[0, 1, 2, 3]]),
        ("aaaa", 2, [[0, 1], [2, 3]]),
        ("aabbcc", 2, [[0, 1, 2], [3, 4, 5]]),
        ("aaab", 2, [[0, 1, 2], [3]]),
        ("a", 5, [[0]]),
    ],
)
def test_ranks_of_a_node_read_one_stream(
    nodes: str, streams: int, expected: list[list[int]]
) -> None:
    assert rank_groups(nodes, streams) == expected


@given(total=integers(1, 50), sizes=lists(integers(1, 9), min_size=1, max_size=8))
def test_loaders_and_encoders_are_shared_out_by_ranks(total: int, sizes: list[int]) -> None:
    parts = apportion(total, sizes)
    assert min(parts) >= 1 and sum(parts) == max(total, len(sizes))
    if total % sum(sizes) == 0 and len(set(sizes)) == 1:
        assert all(one == other for one, other in pairwise(parts))
