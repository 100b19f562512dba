"""Plan the utterances of every training step: a pure function of index, seed and epoch.

Utterances are packed into bins of exactly `bin_positions` positions; a training step takes
`bins_per_step` bins. The resume state is one integer, the number of bins consumed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omni.audio.windows import SAMPLES_PER_HOUR
from omni.augment.augment import Augmentation
from omni.augment.speed import Speeds
from omni.plan.packing import Packer, spread
from omni.storage.digest import digest

if TYPE_CHECKING:
    from omni.plan.window_reader import LoadedWindow, WindowedPlan, WindowReader

EMPTY = -1
"""Bin number of a bin of padding."""

# Part of the fingerprint: to be raised when the rules below make other bins of the same input.
_VERSION = 2
# Added to products of weights and epochs, which floating point may put just below an integer.
_ROUNDING = 1e-9


class Steps:
    """Steps of a plan, each of `bins_per_step` bins."""

    bins_per_step: int
    epoch_ends: np.ndarray
    """(epochs,) int64 bins up to the end of each epoch."""

    @property
    def bins(self) -> int:
        raise NotImplementedError

    @property
    def steps(self) -> int:
        return -(-self.bins // self.bins_per_step)

    def epoch(self, bins_consumed: int) -> float:
        """Return the epochs completed after so many bins, e.g. 1.25."""
        return epochs_done(self.epoch_ends, bins_consumed)


@dataclass(frozen=True)
class Plan(Steps):
    """All bins of a run. `members[starts[b]:starts[b + 1]]` are the utterances of bin b."""

    members: np.ndarray
    """(n,) int32 utterance numbers."""
    starts: np.ndarray
    """(bins + 1,) int64 indices of each bin's first member."""
    epoch_ends: np.ndarray
    """(epochs,) int64 bins up to the end of each epoch."""
    bins_per_step: int
    fingerprint: str
    pass_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """(passes,) int64 indices of the first member of each pass over the corpus."""

    @property
    def bins(self) -> int:
        return len(self.starts) - 1

    def bin(self, number: int) -> np.ndarray:
        """Return the utterance numbers of one bin; none for `EMPTY` or a bin past the end."""
        if number == EMPTY or number >= self.bins:
            return self.members[:0]
        return self.members[self.starts[number] : self.starts[number + 1]]

    def passes_of(self, number: int) -> np.ndarray:
        """Return the pass, counted from 0, that each utterance of a bin belongs to.

        The last bin of an epoch holds utterances of two. No pass holds an utterance twice, so
        augmentation draws its changes for (utterance, pass).
        """
        count = len(self.bin(number))
        first = int(self.starts[number]) if count else 0
        indices = np.arange(first, first + count)
        return np.searchsorted(self.pass_starts, indices, side="right") - 1

    def positions(self, lengths: np.ndarray, speeds: Speeds | None = None) -> int:
        """Count the positions that hold an utterance. lengths, speeds: as given to `make_plan`."""
        if speeds is None:
            return int(lengths[self.members].sum())
        parts = np.split(self.members, self.pass_starts[1:])
        return sum(int(speeds.lengths(n)[part].sum()) for n, part in enumerate(parts))


def epochs_done(epoch_ends: Sequence[int] | np.ndarray, bins_consumed: int) -> float:
    """Return the epochs completed after so many bins. epoch_ends: see `Plan`."""
    done = int(np.searchsorted(epoch_ends, bins_consumed, side="right"))
    if done == len(epoch_ends):
        return float(done)
    first = int(epoch_ends[done - 1]) if done else 0
    return done + (bins_consumed - first) / (int(epoch_ends[done]) - first)


class Members(NamedTuple):
    """Utterances of one bin."""

    numbers: np.ndarray
    """(n,) utterance numbers: rows of the index."""
    rows: np.ndarray
    """(n,) rows of the table that holds them."""
    passes: np.ndarray
    """(n,) pass of each, see `Plan.passes_of`."""


class RowsOfBins(Protocol):
    """Rows of some bins: of a whole split, or of the window that a bin is in."""

    @property
    def name(self) -> str: ...
    @property
    def table(self) -> pa.Table: ...
    @property
    def augmentation(self) -> Augmentation | None: ...
    def members(self, number: int) -> Members: ...


@dataclass(frozen=True)
class Split:
    """One corpus, ready for the stream: the index with token ids, and its bins."""

    name: str
    table: pa.Table
    """Rows are `omni.plan.sequences.PlannedRow`s: all of them, or those of the first window."""
    plan: Plan | WindowedPlan
    augmentation: Augmentation | None = None
    """Augmentation of training audio; None leaves all audio as it is."""
    reader: WindowReader | None = None
    """Reads the windows of a corpus that has several."""
    first: LoadedWindow | None = None
    """First of them."""
    totals: Totals | None = None
    """Totals of a corpus that has several windows."""

    @property
    def rows(self) -> int:
        """Utterances of the index."""
        return int(self.table.num_rows) if self.totals is None else self.totals.rows

    @property
    def hours(self) -> float:
        if self.totals is not None:
            return self.totals.samples / SAMPLES_PER_HOUR
        return int(pc.sum(self.table["samples"]).as_py() or 0) / SAMPLES_PER_HOUR

    @property
    def beginning(self) -> Plan:
        """Plan of the rows in `table`: the whole plan, or that of the first window."""
        if self.first is None:
            assert isinstance(self.plan, Plan)
            return self.plan
        return self.first.plan(self.plan)  # type: ignore[arg-type]  # first: of windows

    def members(self, number: int) -> Members:
        """Return the utterances of one bin; none for `EMPTY` or a bin past the end."""
        plan = self.beginning
        numbers = plan.bin(number)
        return Members(numbers, numbers, plan.passes_of(number))

    def of_bin(self, number: int) -> RowsOfBins:
        """Return the rows that hold a bin: this split, or the window of the bin."""
        if self.reader is None or self.first is None or number == EMPTY:
            return self
        if self.first.first_bin <= number < self.first.window.bins:
            return self.first
        return self.reader.window_of(number)


class Totals(NamedTuple):
    """Totals of a corpus that is not in memory."""

    rows: int
    samples: int


def padding_split(name: str, table: pa.Table) -> Split:
    """Make a split without rows, of which only `EMPTY` bins are read. table: has their columns."""
    nothing = np.zeros(0, np.int64)
    return Split(name, table, Plan(nothing, np.zeros(1, np.int64), nothing, 1, fingerprint=""))


def padded_step(bins_per_step: int, workers: int, bins_per_block: int) -> int:
    """Round bins_per_step up so that all ranks take equally many blocks."""
    unit = workers * bins_per_block
    return -(-bins_per_step // unit) * unit


def make_plan(
    lengths: np.ndarray,
    *,
    index_fingerprint: str,
    seed: int,
    bin_positions: int,
    bins_per_step: int,
    epochs: int | None = None,
    max_steps: int | None = None,
    speeds: Speeds | None = None,
    weights: np.ndarray | None = None,
) -> Plan:
    """Plan whole epochs, as many as `epochs` or until `max_steps` steps are full.

    lengths: (n,) positions of each utterance; 0 leaves an utterance out.
    speeds: positions at the speed of each pass; `lengths` are then those at speed 1.
    weights: (n,) occurrences of each utterance in an epoch, see `passes`; None: one each.
    Each epoch has its own permutation, drawn from (seed, epoch), and holds every utterance once.
    A plan of fewer steps is the beginning of one of more.
    The last bin of an epoch, which would be half empty, also takes the first utterances of the next
    epoch: with ten bins to an epoch that is five per cent of all positions.
    Raises ValueError if no utterance has positions, or one has more than a bin.
    """
    usable = np.flatnonzero(lengths > 0)
    if not len(usable):
        raise ValueError("no utterance fits a bin")
    if epochs is None and max_steps is None:
        raise ValueError("either epochs or max_steps is needed")
    packer = Packer(bin_positions)
    planned = 0
    ends: list[int] = []
    pass_starts: list[int] = []
    while (epochs is None or len(ends) < epochs) and (
        # A plan that ends with an epoch needs the next one to fill up its last bin.
        max_steps is None or packer.count <= max_steps * bins_per_step
    ):
        generator = np.random.default_rng([seed, len(ends)])
        for members in [usable] if weights is None else passes(usable, weights, seed, len(ends)):
            order = generator.permutation(members)
            now = lengths if speeds is None else speeds.lengths(len(pass_starts))
            pass_starts.append(planned)
            planned += len(order)
            packer.add(order, now, generator)
        ends.append(packer.count)
    bins = packer.bins()
    sizes, members = bins.sizes, bins.members
    if max_steps is not None:
        sizes = sizes[: max_steps * bins_per_step]
        members = members[: int(sizes.sum())]
        del ends[bisect_left(ends, len(sizes)) + 1 :]
    identity = [_VERSION, index_fingerprint, seed, bin_positions, bins_per_step, epochs]
    inputs = [np.ascontiguousarray(lengths, dtype=np.int64).tobytes()]
    if speeds is not None:
        inputs.append(speeds.identity)
    if weights is not None:
        inputs.append(np.ascontiguousarray(weights, dtype=np.float64).tobytes())
    return Plan(
        members=members,
        starts=np.concatenate(([0], np.cumsum(sizes))),
        epoch_ends=np.asarray(ends, dtype=np.int64),
        bins_per_step=bins_per_step,
        fingerprint=digest(repr(identity), *inputs),
        pass_starts=np.asarray(pass_starts, dtype=np.int64),
    )


def passes(usable: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """Draw the utterances of one epoch of a mixture, in passes that hold none of them twice.

    After e epochs an utterance of weight w has occurred floor(e w + u) times, where u in [0, 1) is
    fixed for the whole run: weight 2 means twice in each epoch; of the utterances of weight 0.5,
    epochs take one half and the other by turns.
    """
    generator = np.random.default_rng([seed, epoch, 1])
    counts = np.zeros(len(weights), dtype=np.int64)
    for weight in np.unique(weights[usable]):
        group = usable[weights[usable] == weight]
        # The u are evenly spaced, so each epoch holds the right number, not only on average.
        turns = np.random.default_rng([seed, len(group)]).permutation(len(group)) / len(group)
        after, before = (np.floor(e * weight + turns + _ROUNDING) for e in (epoch + 1, epoch))
        counts[group] = (after - before).astype(np.int64)
    counts = counts[usable]
    occurrences = np.repeat(usable, counts)
    return [occurrences[members] for members in spread(counts, generator)]


def held_out_step(first_step: int, steps: int, log_every: int, eval_every: int) -> int:
    """Choose the step after which the stream brings the held-out bins.

    Training begins before them, and its first line of metrics does not wait for them. The first
    evaluation finds them.
    """
    evaluation = first_step - first_step % eval_every + eval_every
    return min(first_step + log_every, evaluation, steps)
