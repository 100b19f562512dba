"""Build the Ray Train worker group of one attempt, and the function that each worker runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import Dataset, ExecutionOptions, ExecutionResources
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from omni.cluster.capacity import bundle
from omni.metrics.prometheus import RayPublisher
from omni.metrics.run_files import write_text
from omni.model.download import HubError, SourceError
from omni.plan.plan import Split
from omni.run.prepare import held_bins
from omni.storage.path import ObjectPath, StoragePath
from omni.stream.pipeline import make_stream
from omni.stream.settings import StreamSettings
from omni.train.loop import TrainLoop
from omni.train.reject_log import TooManyRejects
from omni.train.worker_spec import WorkerSpec

FATAL_FAILURE_FILE = "failure.txt"
"""Reason why the run must not be retried, written by rank 0."""
_STREAM = "stream"


def make_trainer(
    spec: WorkerSpec, workers: int, splits: list[ray.ObjectRef[Split]], settings: StreamSettings
) -> TorchTrainer:
    """Build the trainer of one attempt. splits: references to `Split`s in the object store."""
    config = spec.config
    options = ExecutionOptions(preserve_order=True)
    if config.data.buffer_mb is not None:
        options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=config.data.buffer_mb << 20
        )
    timeout = max(1, round(config.train.timeout_seconds))
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Attempts watches for nodes that are about to leave.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    first_step = 0 if spec.resume is None else spec.resume.step
    return TorchTrainer(
        _train_worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(timeout_s=timeout),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees V1's
            num_workers=workers,
            use_gpu=config.train.gpus > 0,
            resources_per_worker=bundle(config.train.cpus, config.train.gpus),
            label_selector=config.train.labels or None,
        ),
        run_config=RunConfig(
            name=f"attempt-{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}",
            **_ray_storage(config.run_dir / ".ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
        datasets={_STREAM: functools.partial(_open_stream, splits, settings, workers, first_step)},
        dataset_config=DataConfig(execution_options=options),
    )


def _ray_storage(folder: StoragePath) -> dict[str, Any]:
    """Return the arguments that make Ray Train keep its own files in `folder`."""
    if isinstance(folder, ObjectPath):
        filesystem, path = folder.filesystem
        return {"storage_path": path, "storage_filesystem": filesystem}
    return {"storage_path": str(folder)}


def _open_stream(
    references: list[ray.ObjectRef[Split]], settings: StreamSettings, workers: int, first_step: int
) -> Dataset:
    """Open the stream: held-out bins once, then the bins of the plan from `first_step` on."""
    config = settings.config
    splits: list[Split] = ray.get(references)
    rows = [(i, held_bins(s, config, workers)) for i, s in enumerate(splits) if s.name != "train"]
    train = next(i for i, s in enumerate(splits) if s.name == "train")
    plan, optim = splits[train].plan, config.optim
    rows.append((train, plan.rows(first_step, optim.steps, workers, optim.bins_per_block)))
    return make_stream(references, [part for part in rows if len(part[1])], settings)


def _train_worker(arguments: dict[str, Any]) -> None:
    """Run the training loop of one Ray Train worker."""
    spec: WorkerSpec = arguments["spec"]
    torch.set_num_threads(spec.config.train.threads)
    context = ray.train.get_context()
    rank, node = context.get_world_rank(), ray.get_runtime_context().get_node_id()
    device = ray.train.torch.get_device() if spec.config.train.gpus else torch.device("cpu")
    blocks = _blocks(spec.config.optim.bins_per_block)
    failure_file = spec.config.run_dir / FATAL_FAILURE_FILE
    try:
        publisher = RayPublisher(spec.config.run.name, rank)
        TrainLoop(spec, blocks, rank, context.get_world_size(), device, node, publisher).run()
    except (TooManyRejects, FloatingPointError) as error:
        # Every rank fails alike and would fail again: tell the driver not to retry.
        if rank == 0:
            write_text(failure_file, str(error))
    except SourceError as error:
        # A refused language model stays refused, while a hub that is down may come back.
        if rank == 0 and not isinstance(error, HubError):
            write_text(failure_file, str(error))
        raise


def _blocks(rows: int) -> Iterator[pa.Table]:
    shard = ray.train.get_dataset_shard(_STREAM)
    yield from shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)
