"""The plan: every utterance once per epoch, full bins, and rows that any cluster can resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import floats, integers, sampled_from

from omni.augment.speed import Speeds, names_of
from omni.plan.packing import pack
from omni.plan.plan import (
    EMPTY,
    Plan,
    held_out_step,
    make_plan,
    passes,
)


def _lengths(count: int, capacity: int, seed: int) -> np.ndarray:
    """Random lengths, many short and few long, up to a whole bin."""
    shares = np.random.default_rng(seed).beta(1, 4, count)
    return np.maximum(1, np.ceil(shares * capacity)).astype(np.int64)


def _plan(lengths: np.ndarray, **settings: Any) -> Plan:
    defaults = {
        "index_fingerprint": "corpus",
        "seed": 0,
        "bin_positions": 64,
        "bins_per_step": 5,
        "epochs": 1,
    }
    return make_plan(lengths, **{**defaults, **settings})


def _same(one: Plan, other: Plan) -> bool:
    return np.array_equal(one.members, other.members) and np.array_equal(one.starts, other.starts)


# -- packing -----------------------------------------------------------------------------------


@given(seed=integers(0, 99), count=integers(1, 2_000), capacity=sampled_from([1, 16, 64, 2_048]))
@settings(max_examples=30, deadline=None)
@example(seed=0, count=4_000, capacity=64)
def test_every_utterance_is_packed_once_and_no_bin_overflows(
    seed: int, count: int, capacity: int
) -> None:
    lengths = _lengths(count, capacity, seed)
    order = np.random.default_rng(seed).permutation(count)
    bins = pack(lengths, order, capacity)
    assert sorted(n for members in bins for n in members) == list(range(count))
    assert all(0 < lengths[members].sum() <= capacity for members in bins)


def test_only_the_utterances_asked_for_are_packed() -> None:
    assert sorted(map(sorted, pack(np.array([5, 9, 5, 9]), np.array([2, 0]), 10))) == [[0, 2]]
    assert list(pack(np.array([5, 9]), np.array([], dtype=np.int64), 10)) == []


def test_perfect_fits_are_found() -> None:
    bins = pack(np.array([7, 3, 6, 4, 5, 5]), np.arange(6), 10)
    assert sorted(map(sorted, bins)) == [[0, 1], [2, 3], [4, 5]]


def test_an_utterance_longer_than_a_bin_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"utterance 1\b.*\b11\b.*\b10\b"):
        pack(np.array([3, 11, 4]), np.arange(3), 10)


@pytest.mark.parametrize("seed", range(3))
def test_bins_of_the_embedded_corpus_are_over_97_percent_full(
    embedded_lengths: np.ndarray, seed: int
) -> None:
    plan = _plan(embedded_lengths, bin_positions=512, seed=seed)
    assert embedded_lengths.sum() / (plan.bins * 512) > 0.97


def test_bins_stay_full_over_many_pools() -> None:
    lengths = _lengths(20_000, 64, seed=1)
    plan = _plan(lengths)
    assert plan.bins > 2_000
    assert lengths.sum() / (plan.bins * 64) > 0.99


# -- epochs ------------------------------------------------------------------------------------


@given(seed=integers(0, 99), count=integers(1, 600))
@settings(max_examples=20, deadline=None)
@example(seed=0, count=1_500)
def test_each_epoch_holds_every_usable_utterance_once(seed: int, count: int) -> None:
    lengths = _lengths(count, 64, seed)
    lengths[1::7] = 0  # left out
    usable = np.flatnonzero(lengths).tolist()
    plan = _plan(lengths, epochs=3, seed=seed)
    assert len(plan.epoch_ends) == 3
    # A bin between two epochs holds the last of one, then the first of the next.
    for number, members in enumerate(plan.members.reshape(3, len(usable))):
        assert sorted(members.tolist()) == usable
        assert plan.starts[plan.epoch_ends[number]] >= (number + 1) * len(usable)
        assert plan.starts[plan.epoch_ends[number] - 1] < (number + 1) * len(usable)
    sums = [lengths[plan.bin(number)].sum() for number in range(plan.bins)]
    assert max(sums) <= 64 and min(sums) > 0


def test_the_same_seed_gives_the_same_plan() -> None:
    lengths = _lengths(300, 64, 0)
    one, again = _plan(lengths, seed=3, epochs=2), _plan(lengths, seed=3, epochs=2)
    assert _same(one, again) and one.fingerprint == again.fingerprint
    assert not _same(one, _plan(lengths, seed=4, epochs=2))


def _epochs(plan: Plan) -> list[list[frozenset[int]]]:
    """The bins of each epoch, in order, as sets of utterances."""
    ends = [0, *plan.epoch_ends.tolist()]
    spans = [range(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return [[frozenset(plan.bin(b).tolist()) for b in span] for span in spans]


def test_epochs_differ_in_order() -> None:
    first, second, third = _epochs(_plan(_lengths(300, 64, 0), epochs=3))
    assert first != second != third != first


@pytest.mark.parametrize("count", [300, 6_000])
def test_utterances_meet_others_in_each_epoch(count: int) -> None:
    first, second = _epochs(_plan(_lengths(count, 64, 0), epochs=2))
    assert len(set(first) & set(second)) < len(first) / 4


def test_long_utterances_are_spread_over_the_epoch() -> None:
    lengths = np.repeat([60, 6], [200, 2_000])
    plan = _plan(lengths)
    where = [b for b in range(plan.bins) if (lengths[plan.bin(b)] == 60).any()]
    assert np.mean(where) == pytest.approx(plan.bins / 2, rel=0.1)


def test_max_steps_takes_as_many_epochs_as_it_needs_and_cuts_the_last() -> None:
    lengths = _lengths(100, 64, 0)
    per_epoch = _plan(lengths).bins
    steps = 2 * per_epoch // 5 + 3
    plan = _plan(lengths, epochs=None, max_steps=steps)
    assert plan.bins == steps * 5 and plan.steps == steps
    assert len(plan.epoch_ends) == 3 and plan.epoch_ends[-1] > plan.bins
    whole = _plan(lengths, epochs=3)
    assert np.array_equal(plan.epoch_ends, whole.epoch_ends)
    assert np.array_equal(plan.members, whole.members[: len(plan.members)])


def test_a_run_may_be_given_more_steps() -> None:
    """A longer plan begins like the shorter one and is the same plan to a checkpoint."""
    lengths = _lengths(100, 64, 0)
    short = _plan(lengths, epochs=None, max_steps=4)
    long = _plan(lengths, epochs=None, max_steps=40)
    assert np.array_equal(long.members[: len(short.members)], short.members)
    assert short.fingerprint == long.fingerprint


def test_the_fingerprint_names_everything_that_changes_the_order() -> None:
    lengths = _lengths(100, 64, 0)
    longer = lengths.copy()
    longer[0] += 1
    plans = [
        _plan(lengths),
        _plan(longer),
        _plan(lengths, seed=1),
        _plan(lengths, index_fingerprint="another corpus"),
        _plan(lengths, bin_positions=65),
        _plan(lengths, bins_per_step=6),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_nothing_to_plan_is_an_error() -> None:
    with pytest.raises(ValueError, match="bin"):
        _plan(np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="epochs.*max_steps"):
        _plan(_lengths(5, 64, 0), epochs=None)
    with pytest.raises(ValueError, match=r"utterance 2\b.*\b65\b"):
        _plan(np.array([1, 2, 65]))


def test_steps_and_empty_bins() -> None:
    plan = _plan(np.full(13, 64))
    assert (plan.bins, plan.steps) == (13, 3)
    assert len(plan.bin(12)) == 1
    assert len(plan.bin(EMPTY)) == len(plan.bin(13)) == 0


def test_epochs_completed_after_so_many_bins() -> None:
    plan = _plan(np.full(8, 64), epochs=2)
    assert plan.epoch_ends.tolist() == [8, 16]
    assert [plan.epoch(bins) for bins in (0, 2, 8, 10, 16, 20)] == [0.0, 0.25, 1.0, 1.25, 2.0, 2.0]


def test_an_epoch_that_was_cut_is_not_complete() -> None:
    plan = _plan(np.full(8, 64), epochs=None, max_steps=2)
    assert plan.epoch(plan.bins) == 1.25


# -- the stream's rows -------------------------------------------------------------------------

CLUSTERS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (4, 3)]


@pytest.fixture
def plan() -> Plan:
    plan = _plan(_lengths(210, 64, 0))
    assert plan.bins % plan.bins_per_step, "the last step is to be incomplete"
    return plan


@pytest.mark.parametrize("positions", [512, 1024, 2048])
def test_small_epochs_waste_nothing_at_their_seams(
    embedded_lengths: np.ndarray, positions: int
) -> None:
    plan = _plan(embedded_lengths, bin_positions=positions, epochs=20)
    assert embedded_lengths[plan.members].sum() > 0.99 * plan.bins * positions
    for number in range(plan.bins):
        members = plan.bin(number)
        assert len(set(members.tolist())) == len(members), "a bin holds nothing twice"
        assert embedded_lengths[members].sum() <= positions


def test_epochs_smaller_than_a_bin_still_end() -> None:
    plan = _plan(np.array([5, 0, 7, 3]), bin_positions=64, epochs=4)
    assert plan.members.tolist() and len(plan.members) == 12
    assert plan.bins == 4 and plan.epoch_ends.tolist() == [1, 2, 3, 4]
    assert plan.epoch(plan.bins) == 4.0


# -- changed speeds ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_lengths_may_change_from_epoch_to_epoch(seed: int) -> None:
    natural = _lengths(300, 64, seed)
    natural[1::7] = 0
    slow = np.ceil(1.1 * natural)
    positions = np.stack([np.where(slow <= 64, slow, 0), natural]).astype(np.int32)
    names = names_of([str(n) for n in range(300)])
    speeds = Speeds((0.9, 1.0), positions, natural, names, seed)
    plan = _plan(natural, epochs=4, seed=seed, speeds=speeds)
    usable = np.flatnonzero(natural)
    assert np.array_equal(plan.pass_starts, np.arange(4) * len(usable))
    seen, held = 0, 0
    for number in range(plan.bins):
        members, passes = plan.bin(number), plan.passes_of(number)
        needs = [speeds.lengths(p)[n] for n, p in zip(members, passes.tolist(), strict=True)]
        assert 0 < sum(needs) <= 64
        assert np.array_equal(passes, np.arange(seen, seen + len(members)) // len(usable))
        seen, held = seen + len(members), held + sum(needs)
    assert held == plan.positions(natural, speeds) > plan.positions(natural)
    short = _plan(natural, epochs=None, max_steps=4, seed=seed, speeds=speeds)
    long = _plan(natural, epochs=None, max_steps=40, seed=seed, speeds=speeds)
    assert np.array_equal(long.members[: len(short.members)], short.members)
    assert short.fingerprint == long.fingerprint != _plan(natural, seed=seed).fingerprint
    assert len(plan.passes_of(EMPTY)) == len(plan.passes_of(plan.bins)) == 0


def test_the_passes_of_a_bin_are_known_without_speeds() -> None:
    plan = _plan(np.full(10, 20), epochs=2)  # three to a bin
    passes = [plan.passes_of(number).tolist() for number in range(plan.bins)]
    assert sum(passes, []) == [0] * 10 + [1] * 10
    assert sum(len(set(p)) == 2 for p in passes) == 1, "one bin at the seam"


# -- mixtures ----------------------------------------------------------------------------------


def _counts(lengths: np.ndarray, weights: np.ndarray, epochs: int, seed: int = 0) -> np.ndarray:
    """(epochs, n) how often each utterance occurs in each epoch, as `passes` says."""
    usable = np.flatnonzero(lengths > 0)
    return np.stack(
        [
            np.bincount(
                np.concatenate([*passes(usable, weights, seed, epoch), usable[:0]]),
                minlength=len(lengths),
            )
            for epoch in range(epochs)
        ]
    )


def test_weights_say_how_often_an_utterance_occurs() -> None:
    lengths = _lengths(400, 64, 0)
    lengths[7] = 0
    weights = np.repeat([1.0, 2.0, 0.5, 2.25], 100)
    counts = _counts(lengths, weights, 8)
    assert (counts[:, 7] == 0).all()
    usable = lengths[:100] > 0
    assert (counts[:, :100][:, usable] == 1).all() and (counts[:, 100:200] == 2).all()
    half, quarter = counts[:, 200:300], counts[:, 300:]
    assert (half.sum(1) == 50).all() and (half[0] + half[1] == 1).all(), "halves take turns"
    assert (quarter.sum(1) == 225).all() and (quarter[:4].sum(0) == 9).all()


@given(weight=floats(0.05, 8), count=integers(1, 50))
@settings(max_examples=30, deadline=None)
@example(weight=1 / 3, count=3)
@example(weight=7.3, count=1)
def test_after_any_number_of_epochs_the_counts_are_within_one(weight: float, count: int) -> None:
    counts = _counts(np.full(count, 5), np.full(count, weight), 30)
    so_far = counts.cumsum(0)
    expected = weight * np.arange(1, 31)[:, None]
    assert (np.abs(so_far - expected) < 1 + 1e-6).all()
    assert (np.abs(counts.sum(1) - weight * count) < 1 + 1e-6).all()


def test_a_plan_of_a_mixture_is_its_epochs_one_after_another() -> None:
    lengths, weights = _lengths(300, 64, 0), np.repeat([1.0, 3.0, 0.5], 100)
    plan = _plan(lengths, weights=weights, epochs=4)
    first = 0
    for counts in _counts(lengths, weights, 4):
        part = plan.members[first : first + counts.sum()]
        assert np.array_equal(np.bincount(part, minlength=300), counts)
        first += len(part)
    assert first == len(plan.members)
    for number in range(plan.bins):
        members = plan.bin(number)
        assert len(set(members.tolist())) == len(members), "a bin holds nothing twice"
        assert 0 < lengths[members].sum() <= 64
    assert lengths[plan.members].sum() > 0.98 * plan.bins * 64


def test_mixtures_are_mixed_all_through_an_epoch() -> None:
    lengths, weights = np.full(1_100, 8), np.repeat([1.0, 5.0], [1_000, 100])
    plan = _plan(lengths, weights=weights)
    often = (plan.members >= 1_000).reshape(5, -1).mean(1)
    assert often == pytest.approx(np.full(5, 1 / 3), abs=0.05)


def test_a_longer_plan_of_a_mixture_begins_like_the_shorter() -> None:
    lengths, weights = _lengths(100, 64, 0), np.repeat([1.5, 0.25], 50)
    short = _plan(lengths, weights=weights, epochs=None, max_steps=4)
    long = _plan(lengths, weights=weights, epochs=None, max_steps=40)
    assert np.array_equal(long.members[: len(short.members)], short.members)
    assert short.fingerprint == long.fingerprint
    assert _same(long, _plan(lengths, weights=weights, epochs=None, max_steps=40))


def test_weights_are_part_of_the_fingerprint_and_none_leaves_it_as_it_was() -> None:
    lengths = _lengths(100, 64, 0)
    plain = _plan(lengths)
    assert plain.fingerprint == "fd6ffbd4948b896413c77481"
    others = [_plan(lengths, weights=np.full(100, w)).fingerprint for w in (1.0, 2.0)]
    assert len({plain.fingerprint, *others}) == 3


def test_epochs_that_hold_nothing_pass() -> None:
    plan = _plan(np.array([5, 7]), weights=np.full(2, 0.1), epochs=None, max_steps=2)
    assert plan.bins == 10
    assert plan.epoch(plan.bins) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_whose_speeds_change_keeps_both_promises(seed: int) -> None:
    """Each pass of an epoch draws its own speeds; weights say how many passes hold an utterance."""
    natural = _lengths(90, 64, seed)
    slow = np.ceil(1.1 * natural)
    positions = np.stack([np.where(slow <= 64, slow, 0), natural]).astype(np.int32)
    speeds = Speeds((0.9, 1.0), positions, natural, names_of([str(n) for n in range(90)]), seed)
    weights = np.repeat([1.0, 3.0, 0.5], 30)
    plan = _plan(natural, epochs=4, seed=seed, speeds=speeds, weights=weights)
    assert len(plan.pass_starts) == 4 * 3
    held = 0
    for number in range(plan.bins):
        members, passes_of = plan.bin(number), plan.passes_of(number)
        needs = [speeds.lengths(p)[n] for n, p in zip(members, passes_of.tolist(), strict=True)]
        assert 0 < sum(needs) <= 64
        assert len(set(members.tolist())) == len(members)
        held += sum(needs)
    assert held == plan.positions(natural, speeds)
    counts = np.bincount(plan.members, minlength=90)
    assert counts.tolist() == [4] * 30 + [12] * 30 + [2] * 30
    for part in np.split(plan.members, plan.pass_starts[1:]):
        assert len(set(part.tolist())) == len(part), "a pass holds none twice"


@given(
    first=integers(0, 40),
    steps=integers(0, 40),
    log_every=integers(1, 30),
    eval_every=integers(1, 30),
)
@example(first=0, steps=20, log_every=10, eval_every=5)
def test_held_out_bins_come_before_the_first_evaluation(
    first: int, steps: int, log_every: int, eval_every: int
) -> None:
    last = first + steps
    held = held_out_step(first, last, log_every, eval_every)
    evaluations = [s for s in range(first + 1, last + 1) if s % eval_every == 0 or s == last]
    assert first <= held <= min([*evaluations, last])
    assert held <= first + log_every
