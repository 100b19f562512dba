"""Stop a process from writing into a folder once another process has taken it over.

A process that holds the lease of a folder (omni/storage/lease.py) registers a check here. Every
writer of this package, of the run's files and of checkpoints asks for it just before its bytes
become visible. Paths outside such folders are free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_MAX_AGE = 1.0  # seconds that a check stays valid for files that can be taken back


class LeaseError(RuntimeError):
    """Another process writes, or may write, into the folder; the message names it."""


class LeaseLost(LeaseError):
    """Another process has taken the folder over."""


@dataclass
class Fence:
    """Permission to write into a folder under the number of a lease.

    find_successor: asks the storage, and describes the process that has taken over; None while the
    lease holds. Raises OSError where the storage does not answer.
    """

    folder: str
    number: int
    find_successor: Callable[[int], str | None]
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while the number changes."""
    _checked: float = float("-inf")

    def check(self, max_age: float = 0.0) -> None:
        """Raise LeaseLost if another process has taken over.

        max_age: seconds that the last answer of the storage may be old. A process that was stopped
        meanwhile asks again: the clock went on.
        """
        with self.lock:
            if time.monotonic() - self._checked <= max_age:
                return
            asked = time.monotonic()
            successor = self.find_successor(self.number)
            if successor is not None:
                raise LeaseLost(
                    f"{self.folder}: {successor} has taken over this run; this process, with "
                    f"lease {self.number}, stops and writes nothing more"
                )
            self._checked = asked


_fences: dict[str, Fence] = {}


def register(fence: Fence) -> None:
    """Check `fence` before every write into its folder by this process."""
    _fences[fence.folder] = fence


def unregister(fence: Fence) -> None:
    if _fences.get(fence.folder) is fence:
        del _fences[fence.folder]


def is_registered(fence: Fence) -> bool:
    return _fences.get(fence.folder) is fence


def check_fence(path: object, *, fresh: bool = False) -> None:
    """Raise LeaseLost if `path` is in a folder whose lease this process has lost.

    fresh: ask the storage now, for what cannot be taken back; otherwise once per second.
    """
    fence = _fence_of(path)
    if fence is not None:
        fence.check(0.0 if fresh else _MAX_AGE)


def lease_number(path: object) -> int | None:
    """Return the number of the lease under which this process writes `path`; None without one."""
    fence = _fence_of(path)
    return None if fence is None else fence.number


def _fence_of(path: object) -> Fence | None:
    if not _fences:
        return None
    text = str(path)
    for folder, fence in list(_fences.items()):
        if text == folder or text.startswith(f"{folder}/"):
            return fence
    return None
