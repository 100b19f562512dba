"""Restart policy of a run.

Start Ray Train worker groups one after another, each from the newest valid checkpoint, until the
plan is done. Between attempts the driver can do what a group cannot do for itself: change the
number of workers, move away from a node that is about to leave, stop on a signal.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import ray
import ray.exceptions

from omni.checkpoint.checkpoint import CheckpointError
from omni.checkpoint.resume import ResumePoint, find_resume_point, newest_step
from omni.checkpoint.retention import remove_staging
from omni.cluster.capacity import (
    Demand,
    cluster_nodes,
    describe_resources,
    free_nodes,
    stages_that_fit,
    workers_that_fit,
)
from omni.errors import counted
from omni.metrics.prometheus import RayPublisher
from omni.metrics.run_files import count_events, read_events, write_event
from omni.run.block_steps import Pace, recent_pace, steps_per_block
from omni.run.encoder_need import needs_encoder
from omni.run.failures import (
    is_cluster_lost,
    is_preempted,
    is_without_room,
    root_cause,
)
from omni.run.prepare import Prepared, make_worker_spec
from omni.run.resize import ResizePolicy
from omni.run.restore_parts import restore_parts
from omni.run.signals import Signals
from omni.run.train_worker import FATAL_FAILURE_FILE
from omni.run.worker_group import make_trainer
from omni.storage.fence import check_fence
from omni.storage.lease import Lease
from omni.storage.uri import reason_of
from omni.stream.pipeline import Share, SharedSettings
from omni.stream.stream_settings import stream_settings
from omni.stream.streams import Streams
from omni.stream.window_server import put_split
from omni.train.stop_request import StopRequest

_POLL_SECONDS = 0.2
_CLUSTER_POLL_SECONDS = 2.0


class TrainingError(RuntimeError):
    """Training failed for good; the message says why in one line."""


class Attempts:
    """Run attempts until the plan is trained, a signal comes, or failures repeat."""

    def __init__(
        self, prepared: Prepared, signals: Signals, lease: Lease, publisher: RayPublisher
    ) -> None:
        self._prepared, self._config, self._signals = prepared, prepared.config, signals
        self._lease, self._publisher = lease, publisher
        self._run_dir = prepared.config.run_dir
        self._stop = StopRequest(self._run_dir)
        # The stages read indexes and plans from the object store. The references travel in lists:
        # Ray would resolve one that is an argument itself.
        put = [put_split(split, self._config, prepared.tasks) for split in prepared.splits.values()]
        # An actor lives as long as its handle.
        self._splits, self._servers = [list(found) for found in zip(*put, strict=True)]
        self._settings = stream_settings(self._config, prepared.encoder)
        self._verified: tuple[ResumePoint | None, list[str]] | None = (
            None if prepared.resume is None else ResumePoint.of(prepared.resume, self._run_dir),
            prepared.damaged,
        )
        """Resume point of the next attempt, where it has been verified already."""
        self._chosen = self._verified
        """Resume point of the last attempt, and damaged checkpoints that are newer."""
        self._damaged: list[str] = []
        """Damaged checkpoints that the previous attempt met."""
        self._polled = 0.0
        """time.monotonic() of the last poll of the cluster."""
        train = self._config.train
        self._resize = ResizePolicy(train.most, train.resize_seconds)

    def run(self) -> bool:
        """Return True when the plan is trained, False when a signal ended it before.

        Raises TrainingError; LeaseLost if another driver took over.
        """
        failures, reached = 0, self._step()
        failure_file = self._run_dir / FATAL_FAILURE_FILE
        first = True
        while True:
            # A number of its own fences the ranks of the attempt before, which may still run on a
            # node that lost its connection to the head.
            if not first:
                self._lease.advance()
            first = False
            check_fence(failure_file, fresh=True)
            failure_file.unlink(missing_ok=True)
            self._stop.clear()
            seen = count_events(self._run_dir)
            workers = self._choose_workers()
            self._publisher.publish("omni_attempts", 1)
            error = self._attempt(workers, seen)
            self._lease.raise_if_lost()
            if self._has_event(seen, "finished"):
                return True
            if self._signals.received:
                return False
            if failure_file.is_file():
                raise TrainingError(failure_file.read_text())
            if error is None:
                continue  # The group was stopped, to continue elsewhere or with another size.
            if is_without_room(error):
                self._report_no_room(workers)
                self._verified = self._chosen  # No rank has run since.
                continue  # Choose again: another job, or a node, may have come or gone.
            reason = root_cause(error, read_events(self._run_dir, seen))
            write_event(self._run_dir, "failure", self._step(), reason=reason)
            if self._step() > reached:
                failures = 0
            reached = self._step()
            # A node that was taken away says nothing about the run: it does not count.
            failures += not is_preempted(error)
            if not ray.is_initialized() or is_cluster_lost(error):
                raise TrainingError(f"the Ray cluster is gone ({reason})") from error
            if 0 <= self._config.train.max_failures < failures:
                raise TrainingError(reason) from error

    def _step(self) -> int:
        return newest_step(self._run_dir / "checkpoints")

    def _has_event(self, seen: Mapping[str, int], *kinds: str) -> bool:
        """Tell whether an event of these kinds was written after those that `seen` counts."""
        return any(row["event"] in kinds for row in read_events(self._run_dir, seen))

    def _attempt(self, workers: int, seen: Mapping[str, int]) -> BaseException | None:
        """Run one worker group; return the error that ended it, None if its ranks returned.

        seen: counts of the events before it.
        """
        outcome: list[BaseException] = []

        def fit() -> None:
            # Here rather than before the thread: verification may take minutes, or wait for
            # storage, and a signal must be answered meanwhile.
            try:
                resume, nodes = self._choose_resume_point(), len(cluster_nodes())
                first = 0 if resume is None else resume.step
                if restore_parts(self._prepared):
                    reason = "files of prepared parts were gone"
                    write_event(self._run_dir, "prepared again", first, reason=reason)
                encode = needs_encoder(self._prepared.splits, self._settings, first)
                spec = make_worker_spec(
                    self._prepared, workers, resume, nodes, self._lease.number, encode
                )
                steps = steps_per_block(self._prepared, encode, workers, self._pace())
                spec = replace(spec, steps_per_block=steps)
                settings = SharedSettings.put(replace(self._settings, encode=encode))
                room = Share(*stages_that_fit(free_nodes(), Demand.of(self._config), workers))
                streams = Streams(self._splits, settings, first, spec.held_step, room, steps)
                make_trainer(spec, workers, streams).fit()
            except BaseException as error:  # A lost connection raises SystemExit.
                outcome.append(error)

        # Signals reach the main thread, which must not block in Ray then.
        thread = threading.Thread(target=fit, daemon=True, name="fit")
        thread.start()
        deadline: float | None = None
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            self._lease.raise_if_lost()
            if deadline is not None:
                stopped = self._has_event(seen, "stopped", "finished")
                if time.monotonic() > deadline or self._signals.repeated or stopped:
                    return None
            elif self._signals.received:
                self._stop.write(self._signals.received)
                deadline = time.monotonic() + self._config.run.grace_seconds
            elif time.monotonic() - self._polled > _CLUSTER_POLL_SECONDS:
                self._polled = time.monotonic()
                self._poll_cluster(workers, seen)
        self._polled = 0.0
        self._resize.restart()
        return outcome[0] if outcome else None

    def _pace(self) -> Pace | None:
        """Return the pace of the run so far, or that which is expected."""
        expected = self._prepared.estimate
        before = None if expected is None else Pace(expected.busy, expected.pace)
        return recent_pace(self._run_dir) or before

    def _choose_resume_point(self) -> ResumePoint | None:
        """Choose and verify the checkpoint of the next attempt, once for all its ranks.

        Logs damaged checkpoints that the previous attempt did not meet. Raises CheckpointError
        where storage fails.
        """
        try:
            remove_staging(self._run_dir / "checkpoints")
            resume, damaged = self._verified or find_resume_point(self._run_dir)
            self._chosen, self._verified = (resume, damaged), None
            step = 0 if resume is None else resume.step
            for reason in damaged:
                if reason not in self._damaged:
                    write_event(self._run_dir, "damaged checkpoint", step, reason=reason)
        except OSError as error:
            # A ConnectionError would pass for a lost cluster.
            raise CheckpointError(
                f"{self._run_dir / 'checkpoints'}: cannot be read: {reason_of(error)}"
            ) from error
        self._damaged = damaged
        return resume

    # -- number of workers ---------------------------------------------------------------------

    def _choose_workers(self) -> int:
        train = self._config.train
        if train.least == train.most:
            return train.most
        return max(train.least, self._capacity())

    def _report_no_room(self, workers: int) -> None:
        """Log that a group of `workers` could not start in time; another try follows."""
        free = describe_resources(free_nodes())
        reason = f"no room for {counted(workers, 'worker')}; other jobs leave {free}"
        write_event(self._run_dir, "no room", self._step(), reason=reason, workers=workers)

    def _capacity(self) -> int:
        """Return the number of workers that fit into what other jobs leave of the cluster."""
        train = self._config.train
        return workers_that_fit(free_nodes(), Demand.of(self._config), train.least, train.most)

    def _poll_cluster(self, workers: int, seen: Mapping[str, int]) -> None:
        """Ask the group to stop if it should continue elsewhere or with another size."""
        reason = None
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
            reason = self._reason_to_move(workers, seen)
        if reason is not None:
            write_event(self._run_dir, "moving", self._step(), reason=reason)
            self._stop.write(reason)
            self._polled = float("inf")  # Ask once per attempt.

    def _reason_to_move(self, workers: int, seen: Mapping[str, int]) -> str | None:
        events = read_events(self._run_dir, seen)
        used = {node for row in events if row["event"] == "attempt" for node in row["nodes"]}
        leaving = {node.id for node in cluster_nodes() if node.leaving} & used
        if leaving:
            return f"{len(leaving)} node(s) with workers will be taken away"
        train = self._config.train
        if train.least < train.most:
            capacity = max(self._capacity(), train.least)
            if self._resize.poll(capacity, workers, time.monotonic()):
                return f"the cluster has room for {capacity} workers"
        return None
