"""Plan the utterances of every training step: a pure function of index, seed and epoch.

Utterances are packed into bins of exactly `bin_positions` positions; a training step takes
`bins_per_step` bins. The resume state is one integer, the number of bins consumed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from omni.augment.augment import Augmentation
from omni.augment.speed import Speeds
from omni.plan.packing import Bins, pack
from omni.storage.digest import digest

EMPTY = -1
"""Bin number of a bin of padding."""

# Part of the fingerprint: to be raised when the rules below make other bins of the same input.
_VERSION = 2
# Utterances that are tried for the free positions of an epoch's last bin.
_SEAM_CANDIDATES = 10_000
# Added to products of weights and epochs, which floating point may put just below an integer.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Plan:
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

    @property
    def steps(self) -> int:
        return -(-self.bins // self.bins_per_step)

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

    def epoch(self, bins_consumed: int) -> float:
        """Return the epochs completed after so many bins, e.g. 1.25."""
        return epochs_done(self.epoch_ends, bins_consumed)

    def rows(
        self, first_step: int, last_step: int, workers: int, bins_per_block: int
    ) -> np.ndarray:
        """List the bin numbers, one per row of the stream, of steps [first_step, last_step).

        Each step is filled up with `EMPTY` to a multiple of workers x bins_per_block, so that every
        rank takes the same number of blocks and a step's bins do not depend on the world size.
        """
        width = padded_step(self.bins_per_step, workers, bins_per_block)
        rows = np.full((last_step - first_step, width), EMPTY, dtype=np.int64)
        steps = np.arange(first_step, last_step, dtype=np.int64)[:, None]
        rows[:, : self.bins_per_step] = steps * self.bins_per_step + np.arange(self.bins_per_step)
        rows[rows >= self.bins] = EMPTY
        return rows.reshape(-1)


def epochs_done(epoch_ends: Sequence[int] | np.ndarray, bins_consumed: int) -> float:
    """Return the epochs completed after so many bins. epoch_ends: see `Plan`."""
    done = int(np.searchsorted(epoch_ends, bins_consumed, side="right"))
    if done == len(epoch_ends):
        return float(done)
    first = int(epoch_ends[done - 1]) if done else 0
    return done + (bins_consumed - first) / (int(epoch_ends[done]) - first)


@dataclass(frozen=True)
class Split:
    """One corpus, ready for the stream: the index with token ids, and its bins."""

    name: str
    table: pa.Table
    """Rows are `omni.plan.sequences.PlannedRow`s."""
    plan: Plan
    augmentation: Augmentation | None = None
    """Augmentation of training audio; None leaves all audio as it is."""


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
    done: list[Bins] = []
    # The seam is the last bin so far, which the next pass fills up; `count` includes it.
    seam: list[int] = []
    free = count = planned = 0
    ends: list[int] = []
    pass_starts: list[int] = []
    while (epochs is None or len(ends) < epochs) and (
        # A plan that ends with an epoch needs the next one to fill up its last bin.
        max_steps is None or count <= max_steps * bins_per_step
    ):
        generator = np.random.default_rng([seed, len(ends)])
        for members in [usable] if weights is None else passes(usable, weights, seed, len(ends)):
            order = generator.permutation(members)
            now = lengths if speeds is None else speeds.lengths(len(pass_starts))
            pass_starts.append(planned)
            planned += len(order)
            if count:
                order, free = _fill_seam(seam, free, now, order)
            packed = pack(now, order, bin_positions, generator)
            if len(packed):
                if count:
                    done.append(Bins.single(seam))
                # The emptiest bin ends the pass, and is filled up from the next one.
                filled = packed.filled(now)
                emptiest = int(np.argmin(filled))
                free = bin_positions - int(filled[emptiest])
                seam = packed.take(np.array([emptiest])).members.tolist()
                # Best fit puts long utterances into early bins, so the bins are shuffled again.
                others = np.delete(np.arange(len(packed)), emptiest)
                done.append(packed.take(others[generator.permutation(len(others))]))
                count += len(packed)
        ends.append(count)
    bins = Bins.join([*done, Bins.single(seam)] if count else done)
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
    most = int(counts.max())
    first = generator.integers(max(1, most), size=len(usable))
    by_pass: list[list[np.ndarray]] = [[] for _ in range(most)]
    for copy in range(most):
        # The copies of an utterance are spread evenly over the passes, from a random one on.
        again = counts > copy
        targets = (first[again] + copy * most // counts[again]) % most
        members = usable[again][np.argsort(targets, kind="stable")]
        ends = np.cumsum(np.bincount(targets, minlength=most))
        for target, part in enumerate(np.split(members, ends[:-1])):
            by_pass[target].append(part)
    joined = [np.concatenate(parts) for parts in by_pass]
    return [members for members in joined if len(members)]


def _fill_seam(
    seam: list[int], free: int, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, int]:
    """Append utterances of `order` to `seam`, which has `free` positions left.

    Takes the first that fit, but none that the bin holds already. Returns the others, in order, and
    the positions that remain free.
    """
    held = set(seam)
    taken = []
    for index in np.flatnonzero(lengths[order] <= free)[:_SEAM_CANDIDATES].tolist():
        number = int(order[index])
        if lengths[number] <= free and number not in held:
            seam.append(number)
            taken.append(index)
            free -= int(lengths[number])
    return np.delete(order, taken), free


def held_bins(split: Split, workers: int, bins_per_block: int) -> np.ndarray:
    """Return a held-out split's bins, padded so that all ranks take equally many blocks."""
    unit = workers * bins_per_block
    bins = np.full(-(-split.plan.bins // unit) * unit, EMPTY, dtype=np.int64)
    bins[: split.plan.bins] = np.arange(split.plan.bins)
    return bins


def held_out_step(first_step: int, steps: int, log_every: int, eval_every: int) -> int:
    """Choose the step after which the stream brings the held-out bins.

    Training begins before them, and its first line of metrics does not wait for them. The first
    evaluation finds them.
    """
    evaluation = first_step - first_step % eval_every + eval_every
    return min(first_step + log_every, evaluation, steps)


def stream_bins(
    splits: Sequence[Split],
    workers: int,
    bins_per_block: int,
    first_step: int,
    held_step: int,
    steps: int,
) -> list[tuple[int, np.ndarray]]:
    """List the bins of the stream in order: pairs of (number of a split, its bins).

    They are those of the training steps from `first_step` on, with the held-out ones after
    `held_step`. Each part fills whole blocks for all workers.
    """
    train = next(i for i, split in enumerate(splits) if split.name == "train")

    def of_steps(first: int, last: int) -> tuple[int, np.ndarray]:
        return train, splits[train].plan.rows(first, last, workers, bins_per_block)

    parts = [
        of_steps(first_step, held_step),
        *((i, held_bins(s, workers, bins_per_block)) for i, s in enumerate(splits) if i != train),
        of_steps(held_step, steps),
    ]
    return [part for part in parts if len(part[1])]
