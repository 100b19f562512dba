"""Build the Ray Train worker group of one attempt."""

from __future__ import annotations

import functools
import os
from datetime import datetime, timezone
from typing import Any

import ray
import ray.train
from ray.data import ExecutionOptions, ExecutionResources
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from omni.cluster.capacity import bundle
from omni.plan.plan import Split
from omni.run.train_worker import STREAM, run_worker
from omni.storage.path import ObjectPath, StoragePath
from omni.stream.pipeline import open_stream
from omni.stream.stream_settings import StreamSettings
from omni.train.worker_spec import WorkerSpec


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
        run_worker,
        # By reference: the controller would import the model to read it.
        train_loop_config={"spec": [ray.put(spec)]},
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
        datasets={STREAM: functools.partial(open_stream, splits, settings, workers, first_step)},
        dataset_config=DataConfig(execution_options=options),
    )


def _ray_storage(folder: StoragePath) -> dict[str, Any]:
    """Return the arguments that make Ray Train keep its own files in `folder`."""
    if isinstance(folder, ObjectPath):
        filesystem, path = folder.filesystem
        return {"storage_path": path, "storage_filesystem": filesystem}
    return {"storage_path": str(folder)}
