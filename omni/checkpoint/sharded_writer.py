"""Write checkpoints of a sharded model: each rank its part, in the background.

A step waits for a copy in memory, never for storage, as with `omni.checkpoint.writer`. A checkpoint
goes through three stages, each of which begins when all ranks have done the one before: rank 0
clears the way, every rank writes its files, rank 0 publishes. What follows is decided by all ranks
alike, when they call `poll`, `save` or `wait` together: there is no other communication.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from omni.checkpoint.retention import prune_checkpoints, set_link
from omni.checkpoint.save import (
    Facts,
    Parts,
    WrittenFiles,
    clear_parts,
    publish_parts,
    write_parts,
)
from omni.checkpoint.tensor_files import CheckpointError
from omni.checkpoint.writer import FINAL_SAVE_TIMEOUT, RETRY_SECONDS, WriterLog
from omni.storage.path import StoragePath
from omni.storage.retry import NO_SPACE
from omni.storage.uri import reason_of

_POLL_SECONDS = 0.05

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedCheckpoint:
    """Hold copies of the tensors that one rank writes into a checkpoint."""

    facts: Facts
    weights: Parts
    optimizer: Parts
    best: bool

    @property
    def step(self) -> int:
        return self.facts.state.step


@dataclass(frozen=True)
class _Outcome:
    """Result of a stage on one rank.

    reason: why storage refused. full: it has no space. error: another problem, which ends the run.
    """

    files: WrittenFiles | None = None
    reason: str | None = None
    full: bool = False
    error: str | None = None


class ShardedWriter:
    """Writer of one of several ranks; all ranks call its methods together, but for `close`.

    gather: returns the items of all ranks, by rank; the only collective call. keep: number of
    checkpoints that stay in `folder`. log: called on rank 0, by the thread that calls.
    """

    def __init__(
        self,
        folder: StoragePath,
        keep: int,
        log: WriterLog,
        rank: int,
        gather: Callable[[list[_Report]], list[_Report]],
    ) -> None:
        self._folder, self._keep, self._log = folder, keep, log
        self._rank, self._gather = rank, gather
        self._pending: list[ShardedCheckpoint] = []
        self._writing: ShardedCheckpoint | None = None
        self._stage = 0
        self._files: list[WrittenFiles] = []
        self._result: Future[_Outcome] = Future()
        self._began = 0.0
        self._failure: str | None = None
        """Reason why storage refused the last write; None after a write that succeeded."""
        self._thread = ThreadPoolExecutor(1, "checkpoints")

    def save(self, checkpoint: ShardedCheckpoint) -> None:
        """Queue a checkpoint, as soon as no earlier one is queued, or storage refuses.

        So at most two are held in memory, and of those that wait for storage only the newest and
        the best.
        """
        self.poll()
        while self._pending and self._failure is None:
            time.sleep(_POLL_SECONDS)
            self.poll()
        self._pending.append(checkpoint)
        self.poll()

    def poll(self) -> None:
        """Begin the next stage if all ranks are done with this one.

        Raises CheckpointError on all ranks for an error of any that is not of storage.
        """
        if self._writing is None:
            self._begin_next()
            return
        outcome = self._result.result() if self._result.done() else None
        reports = self._gather([_Report(outcome)])
        outcomes = [report.outcome for report in reports if report.outcome is not None]
        if error := next((o.error for o in outcomes if o.error is not None), None):
            raise CheckpointError(f"{self._folder}: {error}")
        if len(outcomes) < len(reports):
            return
        refused = next((o.reason for o in outcomes if o.reason is not None), None)
        if refused is not None:
            self._try_again(refused, full=any(outcome.full for outcome in outcomes))
        elif self._stage < 2:
            self._files = [outcome.files for outcome in outcomes if outcome.files is not None]
            self._start(self._stage + 1)
        else:
            step, self._writing, self._failure = self._writing.step, None, None
            if self._rank == 0:
                self._log.log_checkpoint(step, time.monotonic() - self._began)
            self._begin_next()

    def wait(self, seconds: float = FINAL_SAVE_TIMEOUT) -> None:
        """Block until all is written. Raises CheckpointError if storage refuses for `seconds`."""
        began = time.monotonic()
        self.poll()
        while self._writing is not None:
            time.sleep(_POLL_SECONDS)
            late = time.monotonic() - began > seconds
            if any(report.late for report in self._gather([_Report(late=late)])):
                raise CheckpointError(f"{self._folder}: cannot be written: {self._failure}")
            self.poll()

    def close(self) -> None:
        """Wait for what this rank is writing; what is not published by then is not a checkpoint."""
        self._thread.shutdown(cancel_futures=True)

    # -- stages --------------------------------------------------------------------------------

    def _begin_next(self, delay: float = 0.0, full: bool = False) -> None:
        if self._pending:
            newest = self._pending[-1:]
            best = [job for job in self._pending[:-1] if job.best][-1:]
            self._pending = newest if newest[0].best else best + newest
            self._writing = self._pending.pop(0)
            self._began = time.monotonic()
            self._start(0, delay, full)

    def _start(self, stage: int, delay: float = 0.0, full: bool = False) -> None:
        assert self._writing is not None
        self._stage = stage
        self._result = self._thread.submit(self._run, self._writing, stage, delay, full)

    def _run(self, job: ShardedCheckpoint, stage: int, delay: float, full: bool) -> _Outcome:
        try:
            if stage == 1:
                return _Outcome(
                    write_parts(self._folder, job.step, self._rank, job.weights, job.optimizer)
                )
            if self._rank == 0 and stage == 0:
                time.sleep(delay)
                if full:
                    prune_checkpoints(self._folder, 1)
                clear_parts(self._folder, job.step)
            elif self._rank == 0:
                path = publish_parts(self._folder, job.facts, self._files)
                if job.best:
                    set_link(self._folder / "best", path)
                prune_checkpoints(self._folder, self._keep)
            return _Outcome()
        except OSError as error:
            return _Outcome(reason=reason_of(error), full=error.errno in NO_SPACE)
        except BaseException as error:
            return _Outcome(error=f"{type(error).__name__}: {error}")

    def _try_again(self, reason: str, full: bool) -> None:
        job, known = self._writing, self._failure
        assert job is not None
        self._failure, self._writing = reason, None
        if self._rank == 0:
            self._log.log_failed_checkpoint(job.step, reason, reason == known)
        self._pending.insert(0, job)
        self._begin_next(RETRY_SECONDS, full)


@dataclass(frozen=True)
class _Report:
    """Report the state of a rank to the others. outcome: None while its stage runs."""

    outcome: _Outcome | None = None
    late: bool = False
