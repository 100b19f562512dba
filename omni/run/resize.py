"""Decide when a run that follows its cluster changes its number of workers."""

from __future__ import annotations

_POLLS_BEFORE_RESIZE = 3
"""Consecutive polls of the cluster that must report the same other capacity."""


class ResizePolicy:
    """Policy of one run with `train.workers: [min, max]`.

    A change costs a restart, so a growing cluster is waited for: until its capacity has not changed
    for `seconds`, or nothing more is wanted. Lost room is given up at once: without it, stages of
    the group cannot run.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._capacity: int | None = None
        self._since = 0.0
        """Time at which the capacity became what it is."""
        self._polls = 0
        """Consecutive polls that reported it, while the group had another size."""

    def poll(self, capacity: int, workers: int, now: float) -> bool:
        """Return whether a group of `workers` should make way for one of `capacity`.

        now: seconds by a clock that only goes on.
        """
        if capacity != self._capacity:
            self._capacity, self._since, self._polls = capacity, now, 0
        self._polls = self._polls + 1 if capacity != workers else 0
        if self._polls < _POLLS_BEFORE_RESIZE:
            return False
        settled = capacity >= self._most or now - self._since >= self._seconds
        return capacity < workers or settled

    def restart(self) -> None:
        """Count polls anew for the next group."""
        self._polls = 0
