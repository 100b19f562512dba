"""Find the window of a bin, plan it, and read its rows, for a corpus that no process holds."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from omni.augment.augment import Augmentation
from omni.plan.part_files import PartFiles
from omni.plan.plan import Members, Plan, Steps
from omni.plan.windows import Window, Windows

_KEPT = 2
"""Windows that a reader keeps: blocks of one are still under way when the next begins."""


@dataclass(frozen=True)
class WindowedPlan(Steps):
    """Steps of a run whose windows are planned one after another, as they are needed."""

    bins_per_step: int
    epoch_ends: np.ndarray
    """(epochs,) int64 bins up to the end of each epoch, estimated from positions: the true number
    is known when its windows have been planned."""
    fingerprint: str
    last_step: int

    @property
    def bins(self) -> int:
        return self.last_step * self.bins_per_step


@dataclass(frozen=True)
class LoadedWindow:
    """One window with its rows in the order of its members."""

    name: str
    window: Window
    first_bin: int
    """Number of its first bin in the run."""
    table: pa.Table
    """Rows are `omni.plan.sequences.PlannedRow`s."""
    augmentation: Augmentation | None
    lengths: np.ndarray
    """(n,) positions of each row at speed 1."""

    def members(self, number: int) -> Members:
        """Return the utterances of one bin of the run. Raises ValueError for another window's."""
        inside = number - self.first_bin
        if not 0 <= inside < self.window.bins:
            raise ValueError(f"bin {number} is not in window {self.window.number}")
        first, last = self.window.starts[inside], self.window.starts[inside + 1]
        numbers = self.window.members[first:last]
        return Members(numbers, np.arange(first, last), self.window.passes[first:last])

    def plan(self, plan: WindowedPlan) -> Plan:
        """Describe the window as a plan of its own, whose utterances are rows of its table."""
        return Plan(
            members=np.arange(len(self.window.members), dtype=np.int32),
            starts=self.window.starts,
            epoch_ends=plan.epoch_ends,
            bins_per_step=plan.bins_per_step,
            fingerprint=plan.fingerprint,
        )


class WindowReader:
    """Plan and rows of a run, window by window.

    known: bins of the first windows, where they have been planned before. planned: called with the
    number and the bins of each window that is planned anew.
    """

    def __init__(
        self,
        name: str,
        windows: Windows,
        files: PartFiles,
        augmentation: Augmentation | None,
        known: Sequence[int] = (),
        planned: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name, self.windows, self.files = name, windows, files
        self._augmentation, self._planned = augmentation, planned
        self._ends = np.cumsum(np.asarray(known, np.int64)).tolist()
        self._plans: OrderedDict[int, Window] = OrderedDict()
        self._loaded: OrderedDict[int, LoadedWindow] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"]
        return {**state, "_plans": OrderedDict(), "_loaded": OrderedDict(), "_planned": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def find(self, number: int) -> tuple[int, int]:
        """Return the number of the window that holds a bin, and the window's first bin.

        Windows that were never planned, up to that one, are planned now: how many bins a window
        has is known only then.
        """
        while not self._ends or number >= self._ends[-1]:
            self._extend()
        window = bisect_right(self._ends, number)
        return window, self._ends[window - 1] if window else 0

    def known_window(self, number: int) -> int | None:
        """Return the number of the window that holds a bin, if it has been planned."""
        if not self._ends or number >= self._ends[-1]:
            return None
        return bisect_right(self._ends, number)

    def first_bin(self, window: int) -> int:
        """Return the first bin of a window."""
        while len(self._ends) < window:
            self._extend()
        return self._ends[window - 1] if window else 0

    def plan(self, window: int) -> Window:
        """Return the plan of one window."""
        if window not in self._plans:
            _keep(self._plans, window, self.windows.plan(window))
        return self._plans[window]

    def load(self, window: int) -> LoadedWindow:
        """Read one window: its plan and its rows."""
        with self._lock:
            if window not in self._loaded:
                _keep(self._loaded, window, self.read(window))
            return self._loaded[window]

    def window_of(self, number: int) -> LoadedWindow:
        """Read the window that holds a bin."""
        return self.load(self.find(number)[0])

    def read(self, number: int) -> LoadedWindow:
        """Read one window anew: its plan and its rows."""
        first_bin, window = self.first_bin(number), self.plan(number)
        table, lengths = self.files.rows(window)
        augmentation = self._augmentation
        if augmentation is not None:
            augmentation = replace(augmentation, speeds=lengths.speeds)
        return LoadedWindow(self.name, window, first_bin, table, augmentation, lengths.natural)

    def _extend(self) -> None:
        number = len(self._ends)
        bins = self.plan(number).bins
        self._ends.append((self._ends[-1] if self._ends else 0) + bins)
        if self._planned is not None:
            self._planned(number, bins)


def _keep(kept: OrderedDict[int, Any], number: int, value: Any) -> None:
    """Add a window, and let go of the oldest one."""
    kept[number] = value
    while len(kept) > _KEPT:
        kept.popitem(last=False)


def epoch_ends(windows: Windows, first: Window, bins: int) -> np.ndarray:
    """Estimate the bins up to the end of each epoch that begins within so many bins.

    first: a window, whose bins are filled as those of all windows are.
    """
    parts = windows.parts
    weights = np.asarray(parts.weights)[parts.sources]
    per_epoch = float((parts.positions * weights).sum()) / first.positions * first.bins
    epochs = int(bins // per_epoch) + 1
    return np.round(per_epoch * np.arange(1, epochs + 1)).astype(np.int64)
