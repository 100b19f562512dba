"""Which utterances make up every training step: a pure function of index, seed and epoch.

Utterances are packed into bins of exactly `bin_positions` positions; a training step takes
`bins_per_step` bins. The resume state is one integer, the number of bins consumed.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from omni.augment.augment import Augmentation
from omni.augment.speed import Speeds
from omni.plan.packing import Bins, pack

_VERSION = 2  # of the rules below: another one makes other bins of the same numbers
EMPTY = -1  # a bin number that stands for a bin of padding
_SEAM_CANDIDATES = 10_000
_ROUNDING = 1e-9  # 3 x 0.1 is under 0.3 in floating point for some numbers


@dataclass(frozen=True)
class Plan:
    """All bins of a run. `members[starts[b]:starts[b + 1]]` are the utterances of bin b."""

    members: np.ndarray  # (n,) int32 utterance numbers
    starts: np.ndarray  # (bins + 1,) int64
    epoch_ends: np.ndarray  # (epochs,) int64: bins up to the end of each epoch
    bins_per_step: int
    fingerprint: str
    # First member of each pass over the corpus; those of a pass follow one another.
    pass_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def bins(self) -> int:
        return len(self.starts) - 1

    @property
    def steps(self) -> int:
        return -(-self.bins // self.bins_per_step)

    def bin(self, number: int) -> np.ndarray:
        """Utterance numbers of one bin; none for `EMPTY` or a bin past the end."""
        if number == EMPTY or number >= self.bins:
            return self.members[:0]
        return self.members[self.starts[number] : self.starts[number + 1]]

    def passes_of(self, number: int) -> np.ndarray:
        """The pass, counted from 0, that each utterance of a bin belongs to: at a seam two.

        None holds an utterance twice: a pass is what augmentation draws its changes for.
        """
        count = len(self.bin(number))
        first = int(self.starts[number]) if count else 0
        places = np.arange(first, first + count)
        return np.searchsorted(self.pass_starts, places, side="right") - 1

    def positions(self, lengths: np.ndarray, speeds: Speeds | None = None) -> int:
        """How many positions hold an utterance. lengths, speeds: what the plan is made of."""
        if speeds is None:
            return int(lengths[self.members].sum())
        parts = np.split(self.members, self.pass_starts[1:])
        return sum(int(speeds.lengths(n)[part].sum()) for n, part in enumerate(parts))

    def epoch(self, bins_consumed: int) -> float:
        """Epochs completed after so many bins, e.g. 1.25."""
        return epochs_done(self.epoch_ends, bins_consumed)

    def rows(
        self, first_step: int, last_step: int, workers: int, bins_per_block: int
    ) -> np.ndarray:
        """The stream's rows for steps [first_step, last_step): bin numbers, one per row.

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
    """Epochs completed after so many bins; epoch_ends: bins up to the end of each epoch."""
    done = int(np.searchsorted(epoch_ends, bins_consumed, side="right"))
    if done == len(epoch_ends):
        return float(done)
    first = int(epoch_ends[done - 1]) if done else 0
    return done + (bins_consumed - first) / (int(epoch_ends[done]) - first)


@dataclass(frozen=True)
class Split:
    """One corpus, ready for the stream: the index with token ids, and its bins."""

    name: str
    table: pa.Table  # index.SCHEMA and tokens, supervised, heard, task_number
    plan: Plan
    augmentation: Augmentation | None = None  # of training audio; others are left as they are


def padded_step(bins_per_step: int, workers: int, bins_per_block: int) -> int:
    """Rows of one step: bins_per_step, rounded up so that all ranks take equally many blocks."""
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
    speeds: where lengths change from pass to pass, those of each; `lengths` are then the natural
    ones.
    weights: (n,) occurrences of each in an epoch, see `passes`; None: one each.
    Each epoch has its own permutation, drawn from (seed, epoch), and holds every utterance once.
    A plan of fewer steps is the beginning of one of more.
    Its last bin, which would be half empty, also takes the first utterances of the next epoch: with
    ten bins to an epoch that is five per cent of all positions.
    """
    usable = np.flatnonzero(lengths > 0)
    if not len(usable):
        raise ValueError("no utterance fits a bin")
    if epochs is None and max_steps is None:
        raise ValueError("either epochs or max_steps is needed")
    done: list[Bins] = []
    seam: list[int] = []  # the last bin so far, which the next pass fills up
    count = 0  # bins, with the seam
    ends: list[int] = []
    pass_starts: list[int] = []
    placed = 0  # utterances of all passes before
    free = 0  # positions in the seam
    while (epochs is None or len(ends) < epochs) and (
        # One epoch more where the plan ends with one: its last bin is filled up from the next.
        max_steps is None or count <= max_steps * bins_per_step
    ):
        generator = np.random.default_rng([seed, len(ends)])
        for members in [usable] if weights is None else passes(usable, weights, seed, len(ends)):
            order = generator.permutation(members)
            now = lengths if speeds is None else speeds.lengths(len(pass_starts))
            pass_starts.append(placed)
            placed += len(order)
            if count:
                order, free = _fill_seam(seam, free, now, order)
            packed = pack(now, order, bin_positions, generator)
            if len(packed):
                if count:
                    done.append(Bins.one(seam))
                # The emptiest bin ends the pass, and is filled up from the next one.
                sums = packed.sums(now)
                emptiest = int(np.argmin(sums))
                free = bin_positions - int(sums[emptiest])
                seam = packed.take(np.array([emptiest])).members.tolist()
                # Best fit puts long utterances into early bins: mix them again.
                others = np.delete(np.arange(len(packed)), emptiest)
                done.append(packed.take(others[generator.permutation(len(others))]))
                count += len(packed)
        ends.append(count)
    bins = Bins.join([*done, Bins.one(seam)] if count else done)
    sizes, members = bins.sizes, bins.members
    if max_steps is not None:
        sizes = sizes[: max_steps * bins_per_step]
        members = members[: int(sizes.sum())]
        del ends[bisect_left(ends, len(sizes)) + 1 :]
    identity = [_VERSION, index_fingerprint, seed, bin_positions, bins_per_step, epochs]
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=12)
    digest.update(np.ascontiguousarray(lengths, dtype=np.int64).tobytes())
    if speeds is not None:
        digest.update(speeds.identity)
    if weights is not None:
        digest.update(np.ascontiguousarray(weights, dtype=np.float64).tobytes())
    return Plan(
        members=members,
        starts=np.concatenate(([0], np.cumsum(sizes))),
        epoch_ends=np.asarray(ends, dtype=np.int64),
        bins_per_step=bins_per_step,
        fingerprint=digest.hexdigest(),
        pass_starts=np.asarray(pass_starts, dtype=np.int64),
    )


def passes(usable: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """The utterances of one epoch of a mixture: groups that hold none twice, mixed alike.

    After e epochs an utterance of weight w has occurred floor(e w + u) times, u in [0, 1) its own
    for the whole run: weight 2 is twice in each epoch, weight 0.5 one half in each, by turns.
    """
    generator = np.random.default_rng([seed, epoch, 1])
    counts = np.zeros(len(weights), dtype=np.int64)
    for weight in np.unique(weights[usable]):
        group = usable[weights[usable] == weight]
        # Evenly spaced: an epoch holds the right number of a group, not only on average.
        turns = np.random.default_rng([seed, len(group)]).permutation(len(group)) / len(group)
        after, before = (np.floor(e * weight + turns + _ROUNDING) for e in (epoch + 1, epoch))
        counts[group] = (after - before).astype(np.int64)
    counts = counts[usable]
    most = int(counts.max())
    first = generator.integers(max(1, most), size=len(usable))
    found: list[list[np.ndarray]] = [[] for _ in range(most)]
    for copy in range(most):
        # Copies lie evenly over the passes, from a place of their own on.
        again = counts > copy
        places = (first[again] + copy * most // counts[again]) % most
        members = usable[again][np.argsort(places, kind="stable")]
        ends = np.cumsum(np.bincount(places, minlength=most))
        for place, part in enumerate(np.split(members, ends[:-1])):
            found[place].append(part)
    joined = [np.concatenate(parts) for parts in found]
    return [members for members in joined if len(members)]


def _fill_seam(
    seam: list[int], free: int, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, int]:
    """Move utterances of `order` into the `free` positions of `seam`; returns the rest, in order,
    and what is left free.

    Takes what comes first and fits, but none that the bin holds already.
    """
    here = set(seam)
    taken = []
    for place in np.flatnonzero(lengths[order] <= free)[:_SEAM_CANDIDATES].tolist():
        number = int(order[place])
        if lengths[number] <= free and number not in here:
            seam.append(number)
            taken.append(place)
            free -= int(lengths[number])
    return np.delete(order, taken), free
