"""Plan a corpus window by window: shuffling and packing never look at more than one.

An epoch permutes the parts of the index. A window is the utterances of consecutive parts, up to
`data.window_utterances` of them, and each source of a mixture has its share of every window. The
plan of a window is a pure function of the lengths in its parts, the seed, the epoch and its number:
any window can be planned without those before it, and in the memory of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from omni.augment.speed import Speeds
from omni.plan.packing import Packer, spread
from omni.storage.digest import digest

# Part of the fingerprint: to be raised when the rules below make other bins of the same input.
_VERSION = 1
# Weights are fractions with denominators up to this one, so that counts are exact integers.
_LARGEST_DENOMINATOR = 1000
_Turns: TypeAlias = list[tuple[np.ndarray, np.ndarray]]
"""Turns of a source in an epoch: its parts in order, and the rows that the turn takes of each."""
# Parts of a source round their share of an epoch at this many different places.
_OFFSETS = 64
# Each kind of draw has a stream of random numbers of its own.
_PARTS, _TURNS, _BINS, _ROUNDED = 1, 2, 3, 4


@dataclass(frozen=True)
class PartLengths:
    """Positions of the rows of one part."""

    natural: np.ndarray
    """(rows,) positions of each row at speed 1; 0: not in the plan."""
    speeds: Speeds | None = None
    """Speeds of the part's rows; None where no speed changes."""


@dataclass(frozen=True)
class Parts:
    """Parts of an index in order, with the totals of each: a few bytes for 10,000 utterances."""

    rows: np.ndarray
    """(parts,) int64 rows of each part."""
    usable: np.ndarray
    """(parts,) int64 rows of each part that have positions."""
    sources: np.ndarray
    """(parts,) int64 number of the source that each part belongs to."""
    positions: np.ndarray
    """(parts,) int64 positions of all rows of each part at speed 1."""
    weights: tuple[float, ...]
    """Occurrences in an epoch of each row of each source."""
    digests: tuple[str, ...]
    """Hash of the positions in each part, at all speeds."""

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First utterance number of each part: (parts,)."""
        starts: np.ndarray = np.cumsum(self.rows) - self.rows
        return starts


@dataclass(frozen=True)
class Window:
    """Bins of one window; `members[starts[b]:starts[b + 1]]` are the utterances of its bin b."""

    number: int
    """Number of the window in the run, counted from 0."""
    members: np.ndarray
    """(n,) int64 utterance numbers."""
    starts: np.ndarray
    """(bins + 1,) int64 indices of each bin's first member."""
    passes: np.ndarray
    """(n,) int32 pass of each member, see `Plan.passes_of`."""
    positions: int
    """Positions of all members."""

    @property
    def bins(self) -> int:
        return len(self.starts) - 1

    def bin(self, number: int) -> np.ndarray:
        """Return the utterance numbers of one bin, counted from the window's first."""
        return self.members[self.starts[number] : self.starts[number + 1]]


class Windows:
    """Plan of a run's windows. read: returns the lengths of a part by its number."""

    def __init__(
        self,
        parts: Parts,
        read: Callable[[int], PartLengths],
        *,
        seed: int,
        bin_positions: int,
        window_utterances: int,
    ) -> None:
        if not parts.usable.sum():
            raise ValueError("no utterance fits a bin")
        self.parts, self._read = parts, read
        self._seed, self._capacity = seed, bin_positions
        self._size = window_utterances
        self._weights = [
            Fraction(weight).limit_denominator(_LARGEST_DENOMINATOR) for weight in parts.weights
        ]
        self._of_source = [np.flatnonzero(parts.sources == s) for s in range(len(self._weights))]
        expected = sum(
            int(parts.usable[of].sum()) * weight
            for of, weight in zip(self._of_source, self._weights, strict=True)
        )
        self.per_epoch = max(1, -(-expected // window_utterances))
        """Windows of an epoch, all of the same size but for rounding."""
        self._passes = max(-(-weight // 1) for weight in self._weights)
        self._streams: dict[tuple[int, int], _Turns] = {}

    def plan(self, number: int) -> Window:
        """Plan one window of the run, counted over all epochs."""
        rows, passes, lengths = self._occurrences(number)
        generator = self._generator(_BINS, number)
        packer = Packer(self._capacity, names=rows)
        for group in _without_repetition(rows, generator):
            packer.add(generator.permutation(group), lengths, generator)
        bins = packer.bins()
        return Window(
            number=number,
            members=rows[bins.members],
            starts=np.concatenate(([0], np.cumsum(bins.sizes))),
            passes=passes[bins.members],
            positions=int(lengths.sum()),
        )

    def fingerprint(self, index_fingerprint: str, bins_per_step: int) -> str:
        """Hash all that determines the bins of the run."""
        identity = [_VERSION, "windows", index_fingerprint, self._seed, self._capacity]
        shape = [bins_per_step, self._size, self.parts.weights]
        arrays = [self.parts.rows, self.parts.sources]
        return digest(
            repr(identity + shape),
            *(np.ascontiguousarray(array, np.int64).tobytes() for array in arrays),
            *self.parts.digests,
        )

    def rows(self, number: int) -> np.ndarray:
        """Return the utterance numbers of a window in the order of its parts, before packing."""
        return self._occurrences(number)[0]

    def is_complete(self, epoch: int) -> bool:
        """Tell whether the windows of an epoch take all rows of all parts that it has, once."""
        taken: dict[tuple[int, int], int] = {}
        for number in range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch):
            for part, turn, first, last in self._slices(number):
                # The slices of a part follow each other, window after window.
                if taken.get((part, turn), 0) != first:
                    return False
                taken[part, turn] = last
        wanted = {
            (int(part), turn): int(count)
            for source in range(len(self._weights))
            for turn, (order, counts) in enumerate(self._stream(epoch, source))
            for part, count in zip(order, counts, strict=True)
            if count
        }
        return taken == wanted

    def _occurrences(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return utterance numbers, passes and positions of all members of a window."""
        epoch = number // self.per_epoch
        rows: list[np.ndarray] = [np.zeros(0, np.int64)]
        passes: list[np.ndarray] = [np.zeros(0, np.int32)]
        lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
        read = functools.lru_cache(maxsize=None)(self._read)
        for part, turn, first, last in self._slices(number):
            found = read(part)
            usable = np.flatnonzero(found.natural > 0)
            if len(usable) != self.parts.usable[part]:
                raise ValueError(
                    f"part {part} has {len(usable)} usable rows, expected "
                    f"{self.parts.usable[part]}: the prepared corpus has changed"
                )
            within = self._members(part, turn, epoch, usable)[first:last]
            number_of_pass = int(epoch * self._passes + turn)
            positions = found.natural
            if found.speeds is not None:
                positions = found.speeds.lengths(number_of_pass)
            rows.append(within + self.parts.starts[part])
            passes.append(np.full(len(within), number_of_pass, np.int32))
            lengths.append(positions[within].astype(np.int64))
        return np.concatenate(rows), np.concatenate(passes), np.concatenate(lengths)

    def _slices(self, number: int) -> list[tuple[int, int, int, int]]:
        """List (part, turn, first, last): the rows of a window, as slices of `_members`."""
        epoch, index = divmod(number, self.per_epoch)
        slices = []
        for source in range(len(self._weights)):
            orders = self._stream(epoch, source)
            total = sum(int(counts.sum()) for _, counts in orders)
            first, last = (total * n // self.per_epoch for n in (index, index + 1))
            before = 0
            for turn, (order, counts) in enumerate(orders):
                ends = before + np.cumsum(counts)
                at = int(np.searchsorted(ends, first, side="right"))
                while at < len(order) and (start := int(ends[at] - counts[at])) < last:
                    low, high = max(first - start, 0), min(last, int(ends[at])) - start
                    if low < high:
                        slices.append((int(order[at]), turn, low, high))
                    at += 1
                before = int(ends[-1]) if len(ends) else before
        return slices

    def _stream(self, epoch: int, source: int) -> _Turns:
        """Return the turns of a source, made once for all windows of an epoch."""
        if (epoch, source) not in self._streams:
            for old in [key for key in self._streams if key[0] != epoch]:
                del self._streams[old]
            self._streams[epoch, source] = self._make_stream(epoch, source)
        return self._streams[epoch, source]

    def _make_stream(self, epoch: int, source: int) -> _Turns:
        """Return for each turn of a source in an epoch its parts in order, and their rows.

        A turn takes each row of a part once; the last one those that a fraction of the weight adds.
        """
        parts = self._of_source[source]
        usable = self.parts.usable[parts]
        whole = int(self._weights[source])
        turns = [usable] * whole
        rest = self._occurrences_of(parts, epoch) - whole * usable
        if rest.any():
            turns.append(rest)
        streams = []
        for turn, counts in enumerate(turns):
            order = self._generator(_PARTS, epoch, source, turn).permutation(len(parts))
            streams.append((parts[order], counts[order]))
        return streams

    def _occurrences_of(self, parts: np.ndarray, epoch: int) -> np.ndarray:
        """Count the occurrences of the rows of each part in an epoch.

        After e epochs row k (of n) of weight w has occurred floor(e w + (k + o) / n) times, where o
        in [0, 1) is the offset of the part. Hermite's identity sums that up to floor(e w n + o).
        """
        source = int(self.parts.sources[parts[0]]) if len(parts) else 0
        weight, usable = self._weights[source], self.parts.usable[parts]
        offsets = self._offsets(source)
        after, before = (
            (_OFFSETS * e * weight.numerator * usable + offsets * weight.denominator)
            // (_OFFSETS * weight.denominator)
            for e in (epoch + 1, epoch)
        )
        counts: np.ndarray = after - before
        return counts

    def _offsets(self, source: int) -> np.ndarray:
        """Return the offsets of a source's parts, in units of 1 / _OFFSETS, evenly spaced."""
        count = len(self._of_source[source])
        places = self._generator(_ROUNDED, source).permutation(count)
        offsets: np.ndarray = places * _OFFSETS // max(1, count)
        return offsets

    def _members(self, part: int, turn: int, epoch: int, usable: np.ndarray) -> np.ndarray:
        """Return the rows of a part that a turn takes, in order."""
        source = int(self.parts.sources[part])
        weight, count = self._weights[source], len(usable)
        if turn < int(weight):
            return usable
        of_source = self._of_source[source]
        offset = int(self._offsets(source)[np.searchsorted(of_source, part)])
        # The places k are the same in all epochs, so a weight of 0.5 takes one half and the other.
        places = self._generator(_TURNS, part).permutation(count)
        shift = places * _OFFSETS + offset
        after, before = (
            (_OFFSETS * e * weight.numerator * count + shift * weight.denominator)
            // (_OFFSETS * weight.denominator * count)
            for e in (epoch + 1, epoch)
        )
        return usable[after - before > turn]

    def _generator(self, kind: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, kind, *numbers, 0x77])


def _without_repetition(rows: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Divide the occurrences of a window into groups that hold no utterance twice."""
    unique, counts = np.unique(rows, return_counts=True)
    if len(unique) == len(rows):
        return [np.arange(len(rows))]
    sorted_rows = np.argsort(rows, kind="stable")
    return [sorted_rows[members] for members in spread(counts, generator)]
