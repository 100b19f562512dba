"""Serve the windows of a run to its loading tasks: one actor plans and reads each, once.

A window lies in the object store, where the loading tasks of a node share it, from the time that it
is needed next until the one after its successor begins. All that the actor knows can be made again,
so one that dies is replaced by another, on any node.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.exceptions

from omni.plan.plan import EMPTY, padding_split
from omni.plan.windows_file import (
    add_window_bins,
    read_window_bins,
    read_windows_file,
    windows_path,
)

if TYPE_CHECKING:
    from omni.augment.augment import Augmentation
    from omni.config import Config
    from omni.plan.plan import RowsOfBins, Split
    from omni.plan.window_reader import LoadedWindow, WindowedPlan

_KEPT = 3
"""Windows in the object store: the one before, this one, and the next."""
_ATTEMPTS = 5
"""Times that a window is asked for again where the node that held it is lost."""
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class _Served:
    """Describe the split to the actor, which reads the plan in the run's directory."""

    config: Config
    fingerprint: str
    """Fingerprint of the plan."""
    bins: int
    """Bins of the run."""
    tasks: Sequence[str]
    augmentation: Augmentation | None


class WindowServer:
    """Actor that plans and reads windows."""

    def __init__(self, served: _Served) -> None:
        from omni.plan.window_reader import WindowReader
        from omni.storage.path import register_credentials

        register_credentials(served.config.locations)
        run_dir, plan = served.config.run_dir, served.fingerprint

        def planned(window: int, bins: int) -> None:
            # A full disk ends no run: what is not written down is planned again by the next start.
            with contextlib.suppress(OSError):
                add_window_bins(run_dir, plan, window, bins)

        saved = read_windows_file(windows_path(run_dir, plan), served.tasks)
        known = read_window_bins(run_dir, plan)
        windows, augmentation = saved.windows(), served.augmentation
        self._reader = WindowReader("train", windows, saved.files, augmentation, known, planned)
        self._last_bin = served.bins
        self._kept: dict[int, ray.ObjectRef[LoadedWindow]] = {}
        self._lock = threading.Lock()

    def window_of(self, number: int, again: bool = False) -> list[ray.ObjectRef[LoadedWindow]]:
        """Return a reference, in a list, to the window of a bin; begin to make the next one.

        again: its object has been lost.
        """
        known = self._reader.known_window(number)
        if known is not None and not again and (kept := self._kept.get(known)) is not None:
            return [kept]  # While the next one is being made.
        with self._lock:
            window, _ = self._reader.find(number)
            if again:
                self._kept.pop(window, None)
            reference = self._make(window)
        threading.Thread(target=self._make_ahead, args=(window + 1,), daemon=True).start()
        return [reference]

    def windows(self) -> list[int]:
        """Return the numbers of the windows in the object store."""
        return sorted(self._kept)

    def _make_ahead(self, window: int) -> None:
        with self._lock:
            if self._reader.first_bin(window) < self._last_bin:
                self._make(window)

    def _make(self, window: int) -> ray.ObjectRef[LoadedWindow]:
        if window not in self._kept:
            # Windows come in order; an earlier one is asked for where a block was lost.
            for old in sorted(self._kept)[: max(0, len(self._kept) - _KEPT + 1)]:
                del self._kept[old]
            self._kept[window] = ray.put(self._reader.read(window))
        return self._kept[window]


@dataclass(frozen=True)
class ServedSplit:
    """Training split of several windows, as loading tasks see it."""

    name: str
    plan: WindowedPlan
    server: Any
    """Handle of the actor."""
    padding: Split
    """Bins of padding, which are in no window."""

    def of_bin(self, number: int) -> RowsOfBins:
        """Return the window of a bin, from the object store."""
        if number == EMPTY:
            return self.padding
        kept = _WINDOWS.setdefault(self.plan.fingerprint, {})
        for window in kept.values():
            if window.first_bin <= number < window.first_bin + window.window.bins:
                return window
        window = self._fetch(number)
        kept[window.window.number] = window
        # Blocks of one window are still being loaded when the next begins.
        while len(kept) > 2:
            del kept[min(kept)]
        return window

    def _fetch(self, number: int) -> LoadedWindow:
        """Get a window; ask again if the node that holds it is lost meanwhile."""
        for attempt in range(_ATTEMPTS):
            try:
                [reference] = ray.get(self.server.window_of.remote(number, attempt > 0))
                window: LoadedWindow = ray.get(reference)
                return window
            except (ray.exceptions.ObjectLostError, ray.exceptions.RayActorError):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_PAUSE_SECONDS)
        raise AssertionError


_WINDOWS: dict[str, dict[int, LoadedWindow]] = {}
"""Windows that this process has opened, by the fingerprint of their plan."""


def put_split(split: Split, config: Config, tasks: Sequence[str]) -> tuple[ray.ObjectRef[Any], Any]:
    """Put a split into the object store; one of several windows is served by an actor.

    The plan of the latter must be in the run's directory. tasks: names of the tasks of the run.
    Returns a reference to a `Split` or `ServedSplit`, and the actor, which lives as long as its
    handle; None where there is none.
    """
    if split.reader is None:
        return ray.put(split), None
    plan = split.plan
    served = _Served(config, plan.fingerprint, plan.bins, tasks, split.augmentation)
    server = (
        ray.remote(WindowServer)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=8)
        .remote(served)
    )
    padding = padding_split(split.name, split.table.schema.empty_table())
    return ray.put(ServedSplit(split.name, cast("WindowedPlan", plan), server, padding)), server
