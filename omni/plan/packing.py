"""Pack utterances into bins of a fixed size: best fit over pools, for millions of utterances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Bins packed together: enough to fill them well, few enough to keep the shuffled order.
_POOL_BINS = 256
# Utterances that are tried for the free positions of the last bin so far.
_SEAM_CANDIDATES = 10_000


@dataclass(frozen=True)
class Bins:
    """Bins one after another: the first `sizes[0]` of `members` make up bin 0, and so on."""

    members: np.ndarray
    """(n,) int32 utterance numbers."""
    sizes: np.ndarray
    """(bins,) int64 utterances of each bin, at least 1."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[np.ndarray]:
        ends = np.cumsum(self.sizes).tolist()
        for end, size in zip(ends, self.sizes.tolist(), strict=True):
            yield self.members[end - size : end]

    @property
    def starts(self) -> np.ndarray:
        """Index of each bin's first member: (bins,)."""
        starts: np.ndarray = np.cumsum(self.sizes) - self.sizes
        return starts

    def filled(self, lengths: np.ndarray) -> np.ndarray:
        """Sum the lengths of the members of each bin: (bins,) positions."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(lengths[self.members].astype(np.int64), self.starts)

    def take(self, numbers: np.ndarray) -> Bins:
        """Select bins, in the order of `numbers`."""
        sizes = self.sizes[numbers]
        shift = self.starts[numbers] - (np.cumsum(sizes) - sizes)
        return Bins(self.members[np.arange(int(sizes.sum())) + np.repeat(shift, sizes)], sizes)

    @classmethod
    def join(cls, parts: list[Bins]) -> Bins:
        members = [np.zeros(0, np.int32), *(part.members for part in parts)]
        sizes = [np.zeros(0, np.int64), *(part.sizes for part in parts)]
        return cls(np.concatenate(members), np.concatenate(sizes))

    @classmethod
    def single(cls, members: list[int]) -> Bins:
        """Make one bin of the members."""
        return cls(np.asarray(members, np.int32), np.asarray([len(members)], np.int64))


class Packer:
    """Pack groups of utterances one after another into bins without a gap between the groups.

    The emptiest bin of a group, which would be half empty, also takes the first utterances of the
    next group: with ten bins to a group that is five per cent of all positions.
    names: (n,) utterances that must not share a bin where they are equal; None: all differ.
    """

    def __init__(self, capacity: int, names: np.ndarray | None = None) -> None:
        self._capacity, self._names = capacity, names
        self._done: list[Bins] = []
        # The seam is the last bin so far, which the next group fills up; `count` includes it.
        self._seam: list[int] = []
        self._free = 0
        self.count = 0
        """Bins so far."""

    def add(self, order: np.ndarray, lengths: np.ndarray, generator: np.random.Generator) -> None:
        """Pack a group: the utterances of `order`, whose numbers are indices of `lengths`."""
        if self.count:
            order, self._free = self._fill_seam(lengths, order)
        packed = pack(lengths, order, self._capacity, generator)
        if not len(packed):
            return
        if self.count:
            self._done.append(Bins.single(self._seam))
        # The emptiest bin ends the group, and is filled up from the next one.
        filled = packed.filled(lengths)
        emptiest = int(np.argmin(filled))
        self._free = self._capacity - int(filled[emptiest])
        self._seam = packed.take(np.array([emptiest])).members.tolist()
        # Best fit puts long utterances into early bins, so the bins are shuffled again.
        others = np.delete(np.arange(len(packed)), emptiest)
        self._done.append(packed.take(others[generator.permutation(len(others))]))
        self.count += len(packed)

    def bins(self) -> Bins:
        """Return all bins so far, the seam last."""
        return Bins.join([*self._done, Bins.single(self._seam)] if self.count else self._done)

    def _fill_seam(self, lengths: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, int]:
        """Append utterances of `order` to the seam.

        Takes the first that fit, but none that the bin holds already. Returns the others, in
        order, and the positions that remain free.
        """
        free, taken = self._free, []
        held = {self._name(number) for number in self._seam}
        for index in np.flatnonzero(lengths[order] <= free)[:_SEAM_CANDIDATES].tolist():
            number = int(order[index])
            if lengths[number] <= free and self._name(number) not in held:
                self._seam.append(number)
                taken.append(index)
                free -= int(lengths[number])
        return np.delete(order, taken), free

    def _name(self, number: int) -> int:
        return number if self._names is None else int(self._names[number])


def pack(
    lengths: np.ndarray,
    order: np.ndarray,
    capacity: int,
    generator: np.random.Generator | None = None,
) -> Bins:
    """Pack the utterances of `order` into bins of `capacity` positions, best fit, longest first.

    Packing runs over pools of about 256 bins; the utterances of the emptiest bin move on to the
    next pool. With a generator, the order by length is loose (a random 50 to 100 % of the length
    counts): otherwise a small corpus would fall into the same bins in every epoch.
    Raises ValueError if an utterance is longer than a bin.
    """
    ranks = lengths.astype(np.float64)
    if generator is not None:
        ranks *= generator.uniform(0.5, 1.0, size=len(ranks))
    needs = lengths[order]
    if len(order) and int(needs.max()) > capacity:
        worst = int(order[needs.argmax()])
        raise ValueError(
            f"utterance {worst} needs {lengths[worst]} positions, a bin has {capacity}"
        )
    total = np.cumsum(needs)
    bits = [1 << space for space in range(capacity + 1)]
    parts: list[Bins] = []
    carried = np.zeros(0, order.dtype)
    first = carried_positions = 0
    while first < len(order):
        before = int(total[first - 1]) if first else 0
        full = int(np.searchsorted(total, before + _POOL_BINS * capacity - carried_positions))
        last = min(full + 1, len(order))
        pool = np.concatenate([carried, order[first:last]])
        packed = _best_fit(pool[np.lexsort((pool, -ranks[pool]))], lengths, bits)
        first = last
        if first < len(order):
            # The emptiest bin is taken apart again: its members lead the next pool.
            filled = packed.filled(lengths)
            emptiest = int(np.argmin(filled))
            carried = packed.take(np.array([emptiest])).members
            carried_positions = int(filled[emptiest])
            packed = packed.take(np.delete(np.arange(len(packed)), emptiest))
        parts.append(packed)
    return Bins.join(parts)


def _best_fit(numbers: np.ndarray, lengths: np.ndarray, bits: list[int]) -> Bins:
    """Put utterances, in this order, each into the open bin with the least sufficient space.

    Open bins are listed by their free space; a bit mask of the spaces that occur finds the least.
    bits: 1 << space for every space up to the bins' capacity.
    """
    capacity = len(bits) - 1
    by_space: list[list[int]] = [[] for _ in bits]
    mask = count = 0
    targets: list[int] = []
    for need in lengths[numbers].tolist():
        fitting = mask >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            same = by_space[space]
            target = same.pop()
            if not same:
                mask ^= bits[space]
        else:
            space, target = capacity, count
            count += 1
        targets.append(target)
        rest = space - need
        by_space[rest].append(target)
        mask |= bits[rest]
    bins = np.asarray(targets, np.int64)
    order = np.argsort(bins, kind="stable")
    return Bins(numbers[order].astype(np.int32), np.bincount(bins, minlength=count))


def spread(counts: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Divide occurrences of utterances among as few groups as hold none of them twice.

    counts: (n,) occurrences of each utterance. Returns, for each group, indices into all
    occurrences, which lie one after another: those of utterance 0 first.
    """
    most = int(counts.max())
    first = generator.integers(max(1, most), size=len(counts))
    before = np.cumsum(counts) - counts
    groups: list[list[np.ndarray]] = [[] for _ in range(most)]
    for copy in range(most):
        # The copies of an utterance are spread evenly over the groups, from a random one on.
        again = counts > copy
        targets = (first[again] + copy * most // counts[again]) % most
        members = (before[again] + copy)[np.argsort(targets, kind="stable")]
        ends = np.cumsum(np.bincount(targets, minlength=most))
        for target, part in enumerate(np.split(members, ends[:-1])):
            groups[target].append(part)
    joined = [np.concatenate(parts) for parts in groups]
    return [members for members in joined if len(members)]
