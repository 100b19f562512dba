"""Make the plan of a run again, for an audit: whole, or window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from omni.plan.plan import passes
from omni.plan.plan_file import PlanFile
from omni.plan.window_reader import WindowReader
from omni.plan.windows_file import WindowsFile


class AuditedPlan(Protocol):
    """Plan of the first steps of a run."""

    bins_per_step: int
    bins: int
    fingerprint: str
    counts_all: bool
    """Every utterance is trained as often as every other, give or take one."""

    def bin(self, number: int) -> np.ndarray:
        """Return the utterance numbers of one bin."""
        ...

    def ids(self, numbers: Sequence[int]) -> list[str]:
        """Return the ids of utterances."""
        ...

    def epoch(self) -> float:
        """Return the epochs that the steps come to."""
        ...

    def problems(self) -> Iterator[str]:
        """Check that each whole epoch holds every usable utterance once, or by its weight."""
        ...


class WholePlan:
    """Plan that is one window. steps: of the plan."""

    def __init__(self, file: PlanFile, steps: int) -> None:
        self._file, self._plan = file, file.plan(steps)
        self.bins_per_step, self.bins = file.bins_per_step, self._plan.bins
        self.fingerprint = self._plan.fingerprint
        self._consumed = steps * file.bins_per_step
        self.counts_all = file.weights is None

    def bin(self, number: int) -> np.ndarray:
        return self._plan.bin(number)

    def ids(self, numbers: Sequence[int]) -> list[str]:
        return [self._file.ids[number] for number in numbers]

    def epoch(self) -> float:
        return self._plan.epoch(self._consumed)

    def problems(self) -> Iterator[str]:
        file, plan = self._file, self._plan
        usable = np.flatnonzero(file.lengths > 0)
        often = "once" if file.weights is None else "as often as its weight says"
        first = epoch = 0
        while True:
            wanted = usable
            if file.weights is not None:
                groups = passes(usable, file.weights, file.seed, epoch)
                wanted = np.sort(np.concatenate(groups)) if groups else usable[:0]
            if first + len(wanted) > len(plan.members):
                return
            part = np.sort(plan.members[first : first + len(wanted)])
            if not np.array_equal(part, wanted):
                yield f"epoch {epoch} of the plan: expected every utterance {often}"
            first, epoch = first + len(wanted), epoch + 1


class PlanOfWindows:
    """Plan of several windows, of which it holds two at a time.

    known: bins of its windows as the run has written them down.
    """

    def __init__(self, file: WindowsFile, steps: int, known: Sequence[int]) -> None:
        self._file, self._windows, self._known = file, file.windows(), list(known)
        self._reader = WindowReader("train", self._windows, file.files, None)
        self.bins_per_step, self.bins = file.bins_per_step, steps * file.bins_per_step
        self.fingerprint = self._windows.fingerprint(file.index_fingerprint, file.bins_per_step)
        # Counts of all utterances would not fit into memory; each window is checked instead.
        self.counts_all = False

    def bin(self, number: int) -> np.ndarray:
        window, first = self._reader.find(number)
        return self._reader.plan(window).bin(number - first)

    def ids(self, numbers: Sequence[int]) -> list[str]:
        return self._file.files.ids(numbers)

    def epoch(self) -> float:
        window, first = self._reader.find(self.bins)
        bins = self._reader.plan(window).bins
        return (window + (self.bins - first) / bins) / self._windows.per_epoch

    def problems(self) -> Iterator[str]:
        last, _ = self._reader.find(self.bins - 1)
        for number in range(last + 1):
            window = self._reader.plan(number)
            if not np.array_equal(np.sort(window.members), np.sort(self._windows.rows(number))):
                yield f"window {number} of the plan: it does not hold its utterances once each"
            if number < len(self._known) and self._known[number] != window.bins:
                yield (
                    f"window {number} of the plan has {window.bins} bins, the run wrote down "
                    f"{self._known[number]}"
                )
        for epoch in range((last + 1) // self._windows.per_epoch):
            if not self._windows.is_complete(epoch):
                yield f"epoch {epoch} of the plan: its windows do not hold every utterance once"
