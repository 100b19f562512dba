"""Count the CPU time of a process with everything that it starts."""

from __future__ import annotations

import contextlib

import psutil


class ProcessTree:
    """Add up the CPU seconds of a process and of its descendants, also of those that have ended.

    What a process used after it was last looked at and before it ended is missed: look often.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}

    def cpu_seconds(self) -> float:
        """Look at all processes, and return the sum."""
        members = [self._root]
        with contextlib.suppress(psutil.Error):
            members += self._root.children(recursive=True)
        for process in members:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
        return sum(self._seen.values())
