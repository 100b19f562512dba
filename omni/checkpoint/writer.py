"""Write checkpoints in the background: a step waits for a copy in memory, never for storage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from omni.checkpoint.checkpoint import CheckpointError
from omni.checkpoint.retention import prune_checkpoints, set_link
from omni.storage.path import StoragePath
from omni.storage.retry import NO_SPACE
from omni.storage.uri import reason_of

RETRY_SECONDS = 2.0
FINAL_SAVE_TIMEOUT = 180.0
"""Seconds that the end of a run waits for storage."""


@dataclass
class _Pending:
    step: int
    write: Callable[[], StoragePath]
    best: bool


class WriterLog(Protocol):
    """Receiver of what became of each write."""

    def log_checkpoint(self, step: int, seconds: float) -> None: ...

    def log_failed_checkpoint(self, step: int, reason: str, known: bool) -> None:
        """known: the write before this one failed for the same reason."""


class CheckpointWriter:
    """Thread that writes one checkpoint after another into `folder`.

    A full disk or unavailable storage is tried again, while training goes on. Of
    the checkpoints that wait in memory meanwhile, only the newest and the best are kept.
    keep: number of checkpoints that stay in `folder`.
    log: called from the thread.
    """

    def __init__(self, folder: StoragePath, keep: int, log: WriterLog) -> None:
        self._folder, self._keep, self._log = folder, keep, log
        self._pending: list[_Pending] = []
        self._writing: _Pending | None = None
        self._failure: str | None = None
        """Reason why storage refused the last write; None after a write that succeeded."""
        self._error: BaseException | None = None
        """Error other than of storage; it ends the thread."""
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self._thread.start()

    def save(self, step: int, write: Callable[[], StoragePath], best: bool) -> None:
        """Queue `write`, which writes a checkpoint from copies and returns its folder.

        Blocks while an earlier one is still queued, so that at most two are held in memory.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._failure is not None)
            self._raise_error()
            self._pending.append(_Pending(step, write, best))
            self._changed.notify_all()

    def wait(self, seconds: float = FINAL_SAVE_TIMEOUT) -> None:
        """Block until all is written. Raises CheckpointError if storage refuses for `seconds`."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: not self._pending and self._writing is None or self._error is not None,
                timeout=seconds,
            )
            self._raise_error()
            if not done:
                raise CheckpointError(f"{self._folder}: cannot be written: {self._failure}")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise CheckpointError(f"{self._folder}: {self._error}") from self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                self._drop_superseded()
                job = self._writing = self._pending.pop(0)
            reason, began = None, time.monotonic()
            try:
                path = job.write()
                seconds = time.monotonic() - began
                if job.best:
                    set_link(self._folder / "best", path)
                prune_checkpoints(self._folder, self._keep)
            except OSError as error:
                reason = reason_of(error)
                if error.errno in NO_SPACE:
                    prune_checkpoints(self._folder, 1)
            except BaseException as error:
                with self._changed:
                    self._error, self._writing = error, None
                    self._pending.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._writing = None
                reported, self._failure = self._failure, reason
                if reason is not None:
                    self._pending.insert(0, job)
                self._changed.notify_all()
            if reason is None:
                self._log.log_checkpoint(job.step, seconds)
            else:
                self._log.log_failed_checkpoint(job.step, reason, reason == reported)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=RETRY_SECONDS)
                    if self._closing:
                        return

    def _drop_superseded(self) -> None:
        """Keep the newest queued checkpoint, and the best one if that is another."""
        newest = self._pending[-1:]
        best = [job for job in self._pending[:-1] if job.best][-1:]
        self._pending = newest if newest[0].best else best + newest
