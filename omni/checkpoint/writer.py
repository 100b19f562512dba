"""Writing checkpoints beside training: a step waits for a copy in memory, never for storage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from omni.checkpoint.checkpoint import CheckpointError
from omni.checkpoint.retention import prune_checkpoints, set_link
from omni.storage.path import StoragePath, reason_of
from omni.storage.retry import NO_SPACE

_RETRY_SECONDS = 2.0
_FAREWELL_SECONDS = 180.0


@dataclass
class _Pending:
    step: int
    write: Callable[[], StoragePath]
    best: bool


class Saver:
    """One thread that writes one checkpoint after another into `folder`.

    A full disk or storage that is away is reported once and tried again, while training goes on;
    of the checkpoints that then wait in memory only the newest and the best are kept.
    report: called from the thread with the step and the reason of a failure.
    """

    def __init__(self, folder: StoragePath, keep: int, report: Callable[[int, str], None]) -> None:
        self._folder, self._keep, self._report = folder, keep, report
        self._pending: list[_Pending] = []
        self._writing: _Pending | None = None
        self._failed: str | None = None  # why the last try failed
        self._broken: BaseException | None = None  # not a matter of storage
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self._thread.start()

    def save(self, step: int, write: Callable[[], StoragePath], best: bool) -> None:
        """Have `write` called: it writes a checkpoint from copies and returns its folder.

        Waits while the one before is being written, so that at most one is held beside it.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._failed is not None)
            self._raise()
            self._pending.append(_Pending(step, write, best))
            self._changed.notify_all()

    def wait(self, seconds: float = _FAREWELL_SECONDS) -> None:
        """Until all is written. Raises CheckpointError when storage refuses for `seconds`."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: not self._pending and self._writing is None or self._broken is not None,
                timeout=seconds,
            )
            self._raise()
            if not done:
                raise CheckpointError(f"{self._folder}: cannot be written: {self._failed}")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._broken is not None:
            raise CheckpointError(f"{self._folder}: {self._broken}") from self._broken

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                self._drop_superseded()
                job = self._writing = self._pending.pop(0)
            reason = None
            try:
                path = job.write()
                if job.best:
                    set_link(self._folder / "best", path)
                prune_checkpoints(self._folder, self._keep)
            except OSError as error:
                reason = reason_of(error)
                if error.errno in NO_SPACE:
                    prune_checkpoints(self._folder, 1)
            except BaseException as error:
                with self._changed:
                    self._broken, self._writing = error, None
                    self._pending.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._writing = None
                said, self._failed = self._failed, reason
                if reason is not None:
                    self._pending.insert(0, job)
                self._changed.notify_all()
            if reason is not None:
                if reason != said:
                    self._report(job.step, reason)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=_RETRY_SECONDS)
                    if self._closing:
                        return

    def _drop_superseded(self) -> None:
        """What waits since storage failed: the newest, and the best where another came later."""
        newest = self._pending[-1:]
        best = [job for job in self._pending[:-1] if job.best][-1:]
        self._pending = newest if newest[0].best else best + newest
