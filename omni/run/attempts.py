"""A run is a row of attempts: Ray Train starts a group of workers, and whatever ends it short of
the plan's end is followed by the next one, from the newest checkpoint.

The driver decides between attempts, so it can do what a group cannot do for itself: choose the
number of workers, make room on a node that is about to go, stop on a signal with a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import Dataset, ExecutionOptions, ExecutionResources
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from omni.checkpoint.resume import ResumePoint, find_resume_point, newest_step
from omni.cluster.capacity import Demand, bundle, cluster_nodes, workers_that_fit
from omni.metrics.prometheus import RayPublisher
from omni.metrics.run_files import count_events, last_line, read_events, write_event, write_text
from omni.model.download import HubError, SourceError
from omni.plan.plan import Split
from omni.run.make_job import held_bins, make_job
from omni.run.prepare import Prepared
from omni.run.signals import Signals
from omni.storage.path import ObjectPath, StoragePath
from omni.stream.pipeline import make_stream
from omni.stream.settings import StreamSettings, stream_settings
from omni.train.batches import TooManyRejects
from omni.train.loop import TrainLoop
from omni.train.stop_request import StopRequest
from omni.train.worker_spec import WorkerSpec

STREAM = "stream"
FAILURE = "failure.txt"  # why a run stopped for good, written by rank 0
_POLL_SECONDS = 0.2
_CLUSTER_SECONDS = 2.0  # between two looks at the cluster's nodes
_NAMED = 20  # utterances in a message; events.jsonl has all
_CHANGED_LOOKS = 3  # in a row must show another room before the group is changed


class TrainingError(RuntimeError):
    """Training stopped; the message says why in one line."""


class Attempts:
    """Runs attempts until the plan is trained, a signal comes, or failures repeat."""

    def __init__(self, prepared: Prepared, signals: Signals) -> None:
        self._prepared, self._config, self._signals = prepared, prepared.config, signals
        self._run_dir = prepared.config.run_dir
        self._stop = StopRequest(self._run_dir)
        # The driver owns the index and the plans; the stages read them from the object store. The
        # references travel in lists: Ray would resolve one that is an argument itself.
        self._splits = [ray.put(split) for split in prepared.splits.values()]
        self._settings = stream_settings(self._config, prepared.encoder)
        self._looked = 0.0
        self._changed = 0
        self._verified: tuple[ResumePoint | None, list[str]] | None = (
            None if prepared.resume is None else ResumePoint.of(prepared.resume, self._run_dir),
            prepared.damaged,
        )
        """Resume point of the first attempt, which `prepare` has verified already."""
        self._damaged: list[str] = []
        """Damaged checkpoints that an earlier attempt has reported."""

    def run(self) -> bool:
        """True when the plan is trained to its end, False when a signal ended it before.

        Raises TrainingError.
        """
        failures, reached = 0, self._step()
        while True:
            (self._run_dir / FAILURE).unlink(missing_ok=True)
            self._stop.clear()
            seen = count_events(self._run_dir)
            error = self._attempt(self._choose_workers(), seen)
            if self._finished(seen):
                return True
            if self._signals.received:
                return False
            if (self._run_dir / FAILURE).is_file():
                raise TrainingError((self._run_dir / FAILURE).read_text())
            if error is None:
                continue  # another number of workers, or other nodes
            reason = _root_cause(error, read_events(self._run_dir, seen))
            write_event(self._run_dir, "failure", self._step(), reason=reason)
            failures = 1 if self._step() > reached else failures + 1
            reached = self._step()
            if not ray.is_initialized() or _is_cluster_lost(error):
                raise TrainingError(f"the Ray cluster is gone ({reason})") from error
            if 0 <= self._config.train.max_failures < failures:
                raise TrainingError(reason) from error

    def _step(self) -> int:
        return newest_step(self._run_dir / "checkpoints")

    def _finished(self, seen: Mapping[str, int]) -> bool:
        return any(row["event"] == "finished" for row in read_events(self._run_dir, seen))

    def _attempt(self, workers: int, seen: Mapping[str, int]) -> BaseException | None:
        """One worker group from start to end; what ended it, None when its ranks returned.

        seen: the events before it.
        """
        outcome: list[BaseException] = []

        def fit() -> None:
            # Here rather than before the thread: verification may take minutes, or wait for
            # storage, and a signal must be answered meanwhile.
            try:
                self._trainer(workers, self._choose_resume_point()).fit()
            except BaseException as error:  # SystemExit of a lost connection among them
                outcome.append(error)

        # Signals reach the main thread, which must not sit in Ray then.
        thread = threading.Thread(target=fit, daemon=True, name="fit")
        thread.start()
        deadline: float | None = None
        why: str | None = None
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if deadline is not None:
                if time.monotonic() > deadline or self._signals.impatient or self._stopped(seen):
                    return None
            elif self._signals.received:
                self._stop.write(self._signals.received)
                deadline = time.monotonic() + self._config.run.grace_seconds
            elif time.monotonic() - self._looked > _CLUSTER_SECONDS:
                self._looked = time.monotonic()
                with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
                    why = self._should_move(workers, seen)
                if why is not None:
                    write_event(self._run_dir, "moving", self._step(), reason=why)
                    self._stop.write(why)
                    self._looked = float("inf")  # once per attempt
        self._looked, self._changed = 0.0, 0
        return outcome[0] if outcome else None

    def _choose_resume_point(self) -> ResumePoint | None:
        """Choose and verify the checkpoint of the next attempt, once for all its ranks.

        Reports damaged checkpoints that no earlier attempt reported. Raises OSError.
        """
        resume, damaged = self._verified or find_resume_point(self._run_dir)
        self._verified = None
        step = 0 if resume is None else resume.step
        for reason in damaged:
            if reason not in self._damaged:
                write_event(self._run_dir, "damaged checkpoint", step, reason=reason)
        self._damaged = damaged
        return resume

    def _stopped(self, seen: Mapping[str, int]) -> bool:
        """Whether the ranks have said good-bye, checkpoint written."""
        events = read_events(self._run_dir, seen)
        return any(row["event"] in ("stopped", "finished") for row in events)

    # -- how many workers ----------------------------------------------------------------------

    def _choose_workers(self) -> int:
        train = self._config.train
        if train.least == train.most:
            return train.most
        return max(train.least, self._room())

    def _room(self) -> int:
        train = self._config.train
        return workers_that_fit(cluster_nodes(), Demand.of(self._config), train.least, train.most)

    def _should_move(self, workers: int, seen: Mapping[str, int]) -> str | None:
        """Why the group should stop with a checkpoint and start again elsewhere."""
        events = read_events(self._run_dir, seen)
        used = {node for row in events if row["event"] == "attempt" for node in row["nodes"]}
        leaving = {node.id for node in cluster_nodes() if node.leaving} & used
        if leaving:
            return f"{len(leaving)} node(s) with workers will be taken away"
        train = self._config.train
        if train.least < train.most:
            room = max(self._room(), train.least)
            self._changed = self._changed + 1 if room != workers else 0
            if self._changed >= _CHANGED_LOOKS:
                return f"the cluster has room for {room} workers"
        return None

    def _trainer(self, workers: int, resume: ResumePoint | None) -> TorchTrainer:
        config = self._config
        options = ExecutionOptions(preserve_order=True)
        if config.data.buffer_mb is not None:
            options.resource_limits = ExecutionResources.for_limits(
                object_store_memory=config.data.buffer_mb << 20
            )
        timeout = max(1, round(config.train.timeout_seconds))
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # _should_move does it
        return TorchTrainer(
            _work,
            train_loop_config={"job": make_job(self._prepared, workers, resume)},
            torch_config=TorchConfig(timeout_s=timeout),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees V1's
                num_workers=workers,
                use_gpu=config.train.gpus > 0,
                resources_per_worker=bundle(config.train.cpus, config.train.gpus),
                label_selector=config.train.labels or None,
            ),
            run_config=RunConfig(
                name=f"attempt-{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}",
                **_ray_storage(self._run_dir / ".ray"),
                failure_config=FailureConfig(max_failures=0),
            ),
            datasets={
                STREAM: functools.partial(
                    _open_stream,
                    self._splits,
                    self._settings,
                    workers,
                    0 if resume is None else resume.step,
                )
            },
            dataset_config=DataConfig(execution_options=options),
        )


def _ray_storage(place: StoragePath) -> dict[str, Any]:
    """Ray Train keeps what it needs to know of an attempt beside the run's own files."""
    if isinstance(place, ObjectPath):
        filesystem, path = place.filesystem
        return {"storage_path": path, "storage_filesystem": filesystem}
    return {"storage_path": str(place)}


def _open_stream(
    references: list[ray.ObjectRef], settings: StreamSettings, workers: int, first_step: int
) -> Dataset:
    """Open the stream: held-out bins once, then the bins of the plan from `first_step` on."""
    config = settings.config
    splits: list[Split] = ray.get(references)
    rows = [(i, held_bins(s, config, workers)) for i, s in enumerate(splits) if s.name != "train"]
    train = next(i for i, s in enumerate(splits) if s.name == "train")
    plan, optim = splits[train].plan, config.optim
    steps = plan.rows(first_step, optim.steps, workers, optim.bins_per_block)
    rows.append((train, steps))
    return make_stream(references, [part for part in rows if len(part[1])], settings)


def _work(arguments: dict[str, Any]) -> None:
    """The function of one Ray Train worker."""
    job: WorkerSpec = arguments["job"]
    torch.set_num_threads(job.config.train.threads)
    context = ray.train.get_context()
    rank, node = context.get_world_rank(), ray.get_runtime_context().get_node_id()
    device = ray.train.torch.get_device() if job.config.train.gpus else torch.device("cpu")
    blocks = _blocks(job.config.optim.bins_per_block)
    try:
        publisher = RayPublisher(job.config.run.name, rank)
        TrainLoop(job, blocks, rank, context.get_world_size(), device, node, publisher).run()
    except (TooManyRejects, FloatingPointError) as error:
        # Every rank fails alike and would again: leave word for the driver instead of a retry.
        if rank == 0:
            write_text(job.config.run_dir / FAILURE, str(error))
    except SourceError as error:
        # So with a language model that is refused; a hub that is down may come back.
        if rank == 0 and not isinstance(error, HubError):
            write_text(job.config.run_dir / FAILURE, str(error))
        raise


def _blocks(rows: int) -> Iterator[pa.Table]:
    shard = ray.train.get_dataset_shard(STREAM)
    yield from shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)


def _is_cluster_lost(error: BaseException) -> bool:
    """Whether it is Ray itself that went, rather than a worker."""
    return isinstance(error, (SystemExit, ConnectionError, ray.exceptions.RaySystemError))


def _root_cause(error: BaseException, events: Sequence[dict[str, Any]]) -> str:
    """The first failure of a worker, in one line with its rank and what it was at.

    events: of this attempt. Once a rank has failed, those that wait for it fail as well.
    """
    words = [row for row in events if row["event"] == "rank failed"]
    if words:
        first = min(words, key=lambda row: float(row["time"]))
        return f"rank {first['rank']}: {first['reason']}{_at(first)}"
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return f"{type(error).__name__}: {last_line(error)}"
    rank, cause = sorted(failures.items())[0]
    while (deeper := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = deeper
    return f"rank {rank}: {type(cause).__name__}: {last_line(cause)}"


def _at(row: dict[str, Any]) -> str:
    """Step, bins and utterances of a rank's last words; nothing before the first block."""
    bins, ids = row["bins"], row["ids"]
    if not bins:
        return ""
    more = ", ..." if len(ids) > _NAMED else ""
    return (
        f" (step {row['step']}, bins {', '.join(map(str, bins))}, utterances "
        f"{', '.join(ids[:_NAMED])}{more})"
    )
