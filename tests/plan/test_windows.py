"""Windows of a plan: every utterance once per epoch, each source in proportion, each by itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from omni.augment.speed import Speeds, names_of
from omni.plan.plan import Plan, make_plan
from omni.plan.windows import PartLengths, Parts, Window, Windows
from omni.storage.digest import digest

CAPACITY = 64


def _lengths(count: int, seed: int) -> np.ndarray:
    """Random lengths, many short and few long; one in fifty is not in the plan."""
    generator = np.random.default_rng(seed)
    lengths = np.maximum(1, np.ceil(generator.beta(1, 4, count) * CAPACITY)).astype(np.int64)
    lengths[::50] = 0
    return lengths


class _Corpus:
    """Parts of random lengths. sources: parts and rows of each part, of each source."""

    def __init__(
        self,
        sources: list[tuple[int, int]],
        weights: tuple[float, ...] | None = None,
        speeds: tuple[float, ...] | None = None,
    ) -> None:
        self.weights = weights or (1.0,) * len(sources)
        sizes = [
            (source, rows) for source, (parts, rows) in enumerate(sources) for _ in range(parts)
        ]
        self.lengths = [
            PartLengths(natural, None if speeds is None else _speeds(natural, number, speeds))
            for number, natural in enumerate(_lengths(rows, n) for n, (_, rows) in enumerate(sizes))
        ]
        natural = [part.natural for part in self.lengths]
        self.parts = Parts(
            rows=np.array([len(n) for n in natural]),
            usable=np.array([(n > 0).sum() for n in natural]),
            sources=np.array([source for source, _ in sizes]),
            positions=np.array([n.sum() for n in natural]),
            weights=self.weights,
            digests=tuple(digest(n.tobytes()) for n in natural),
        )
        self.all = np.concatenate(natural)
        self.source_of = np.repeat(self.parts.sources, self.parts.rows)
        self.read: Counter[int] = Counter()

    def windows(self, size: int, seed: int = 0) -> Windows:
        def read(part: int) -> PartLengths:
            self.read[part] += 1
            return self.lengths[part]

        return Windows(self.parts, read, seed=seed, bin_positions=CAPACITY, window_utterances=size)


def _speeds(natural: np.ndarray, part: int, factors: tuple[float, ...]) -> Speeds:
    positions = np.stack([np.ceil(natural / factor) for factor in factors]).astype(np.int32)
    positions[positions > CAPACITY] = 0
    names = names_of([f"{part} {row}" for row in range(len(natural))])
    return Speeds(factors, positions, natural, names, seed=3)


def _bins(window: Window) -> list[np.ndarray]:
    return [window.bin(number) for number in range(window.bins)]


# -- a corpus of one window --------------------------------------------------------------------


def _identity(plan: Plan) -> tuple[str, str]:
    arrays = (plan.members, plan.starts, plan.epoch_ends, plan.pass_starts)
    return plan.fingerprint, digest(*(array.astype(np.int64).tobytes() for array in arrays))


def test_a_corpus_of_one_window_has_the_plan_that_it_had_before_there_were_windows() -> None:
    lengths = _recorded_lengths()
    positions = np.stack([np.minimum(64, np.ceil(lengths * 1.1)), lengths, np.ceil(lengths * 0.9)])
    names = names_of([str(n) for n in range(3_000)])
    speeds = Speeds((0.9, 1.0, 1.1), positions.astype(np.int32), lengths, names, 5)
    weights = np.repeat([1.0, 2.5, 0.3], 1_000)

    def identity(**given: object) -> tuple[str, str]:
        fixed = {"index_fingerprint": "corpus", "seed": 5, "bin_positions": 64, "bins_per_step": 5}
        return _identity(make_plan(lengths, **fixed, **given))  # type: ignore[arg-type]

    assert identity(max_steps=400) == ("4a85b9d0d84b59b390600269", "f88d12501fe6fcaf0e4b6ee9")
    assert identity(max_steps=900, weights=weights) == (
        "fc9e0f037e67f90df0162860",
        "92a99ab6303fc99c6a23eae8",
    )
    assert identity(max_steps=400, speeds=speeds) == (
        "90983f04777d56f60300821a",
        "fa7f635258617f60a7f46610",
    )
    assert identity(max_steps=900, speeds=speeds, weights=weights) == (
        "e88785e125606aa530144d4a",
        "fc76614c8a7be006f5258c0b",
    )
    assert identity(epochs=1) == ("b215d0c8575a7a8f259bebd5", "a894592f82646d2cbc7d645f")


def _recorded_lengths() -> np.ndarray:
    shares = np.random.default_rng(3).beta(1, 4, 3_000)
    lengths = np.maximum(1, np.ceil(shares * 64)).astype(np.int64)
    lengths[::50] = 0
    return lengths


# -- windows -----------------------------------------------------------------------------------


def test_each_epoch_holds_every_utterance_once_in_full_bins() -> None:
    corpus = _Corpus([(20, 1_000)])
    windows = corpus.windows(5_000)
    assert windows.per_epoch == 4
    epochs = []
    for epoch in range(2):
        made = [windows.plan(4 * epoch + number) for number in range(4)]
        joined = np.concatenate([window.members for window in made])
        assert np.array_equal(np.sort(joined), np.flatnonzero(corpus.all > 0))
        assert windows.is_complete(epoch)
        for window in made:
            assert abs(len(window.members) - len(joined) / 4) <= 1
            assert (window.passes == epoch).all()
            assert all(corpus.all[members].sum() <= CAPACITY for members in _bins(window))
            assert window.positions / (window.bins * CAPACITY) > 0.998
        epochs.append(joined)
    assert set(epochs[0][:5_000]) != set(epochs[1][:5_000]), "parts are ordered anew"


def test_a_window_is_planned_without_those_before_it_and_reads_its_parts_only() -> None:
    corpus = _Corpus([(40, 500)])
    one_by_one = corpus.windows(2_000)
    made = [one_by_one.plan(number) for number in range(13)]
    corpus.read.clear()
    alone = corpus.windows(2_000).plan(12)
    assert np.array_equal(alone.members, made[12].members)
    assert np.array_equal(alone.starts, made[12].starts)
    # 2,000 rows are four or five of the parts, which are read once each.
    assert 4 <= len(corpus.read) <= 6 and set(corpus.read.values()) == {1}


def test_seed_size_and_lengths_change_the_plan_and_its_fingerprint() -> None:
    corpus = _Corpus([(20, 500)])
    first = corpus.windows(2_000)
    others = [
        corpus.windows(2_000, seed=1),
        corpus.windows(1_900),
        _Corpus([(19, 500)]).windows(2_000),
    ]
    assert not np.array_equal(first.plan(0).members, others[0].plan(0).members)
    prints = {windows.fingerprint("corpus", 4) for windows in [first, *others]}
    prints |= {first.fingerprint("corpus", 5), first.fingerprint("other", 4)}
    assert len(prints) == 6
    assert first.fingerprint("corpus", 4) == corpus.windows(2_000).fingerprint("corpus", 4)


def test_every_source_of_a_mixture_has_its_share_of_every_window() -> None:
    corpus = _Corpus([(30, 1_000), (8, 1_000), (3, 700)], weights=(1.0, 2.5, 0.3))
    windows = corpus.windows(4_000)
    usable = np.bincount(corpus.source_of[corpus.all > 0])
    wanted = usable * corpus.weights / (usable * corpus.weights).sum()
    assert windows.per_epoch == 13
    for number in range(2 * windows.per_epoch):
        members = windows.plan(number).members
        shares = np.bincount(corpus.source_of[members], minlength=3) / len(members)
        assert np.abs(shares - wanted).max() < 0.01


@given(weights=lists(floats(0.05, 9), min_size=1, max_size=3), seed=integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_utterances_occur_by_their_weights_and_never_twice_in_a_bin(
    weights: list[float], seed: int
) -> None:
    corpus = _Corpus([(5, 60 + 7 * n) for n in range(len(weights))], weights=tuple(weights))
    windows = corpus.windows(150, seed)
    epochs = 3
    occurrences = np.zeros(len(corpus.all), np.int64)
    drawn: Counter[tuple[int, int]] = Counter()
    for number in range(epochs * windows.per_epoch):
        window = windows.plan(number)
        np.add.at(occurrences, window.members, 1)
        drawn.update(zip(window.members.tolist(), window.passes.tolist(), strict=True))
        for members in _bins(window):
            assert len(set(members.tolist())) == len(members)
            assert corpus.all[members].sum() <= CAPACITY
    assert all(windows.is_complete(epoch) for epoch in range(epochs))
    assert set(drawn.values()) <= {1}, "augmentation would draw the same changes again"
    assert not occurrences[corpus.all == 0].any()
    for source, weight in enumerate(weights):
        of_source = occurrences[(corpus.source_of == source) & (corpus.all > 0)]
        # Each part rounds; the weight itself is a fraction with a denominator up to 1,000.
        assert of_source.sum() == pytest.approx(
            epochs * weight * len(of_source), abs=5 + 3 * epochs
        )
        assert of_source.max() - of_source.min() <= 1


def test_bins_are_filled_by_the_lengths_of_their_pass() -> None:
    corpus = _Corpus([(10, 300)], weights=(2.0,), speeds=(0.8, 1.0, 1.25))
    windows = corpus.windows(1_000)
    assert windows.per_epoch == 6
    for number in range(12):
        window = windows.plan(number)
        sums = np.zeros(window.bins, np.int64)
        bin_of = np.repeat(np.arange(window.bins), np.diff(window.starts))
        for pass_ in np.unique(window.passes):
            lengths = np.concatenate([part.speeds.lengths(pass_) for part in corpus.lengths])  # type: ignore[union-attr]
            chosen = window.passes == pass_
            np.add.at(sums, bin_of[chosen], lengths[window.members[chosen]])
        assert sums.max() <= CAPACITY and sums.sum() == window.positions
    assert {int(p) for p in windows.plan(11).passes} <= {2, 3}, "two passes an epoch"


def test_a_part_that_has_changed_is_refused() -> None:
    corpus = _Corpus([(4, 100)])
    windows = corpus.windows(200)
    corpus.lengths[2] = PartLengths(np.ones(100, np.int64))
    with pytest.raises(ValueError, match="part 2 has 100 usable rows, expected 98"):
        [windows.plan(number) for number in range(windows.per_epoch)]


def test_a_corpus_without_usable_rows_is_refused() -> None:
    corpus = _Corpus([(2, 100)])
    corpus.parts.usable[:] = 0
    with pytest.raises(ValueError, match="no utterance fits a bin"):
        corpus.windows(50)
