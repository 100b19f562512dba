"""Build the Ray Train worker group of one attempt."""

from __future__ import annotations

import functools
from datetime import datetime, timezone
from typing import Any

import ray
import ray.train
from ray.data import ExecutionOptions, ExecutionResources
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig

from omni.cluster.capacity import bundle, selectors
from omni.cluster.ray_init import owns_cluster
from omni.cluster.ray_internals.train import LocalTrainer, Trainer
from omni.cluster.timeouts import collective_timeout
from omni.plan.plan import Split
from omni.run.process_group import ProcessGroup
from omni.run.train_worker import STREAM, run_worker
from omni.storage.path import ObjectPath, StoragePath
from omni.stream.pipeline import SharedSettings, open_stream
from omni.train.worker_spec import WorkerSpec


def make_trainer(
    spec: WorkerSpec, workers: int, splits: list[ray.ObjectRef[Split]], settings: SharedSettings
) -> Trainer:
    """Build the trainer of one attempt. splits: references to `Split`s in the object store."""
    config = spec.config
    options = ExecutionOptions(preserve_order=True)
    if config.data.buffer_mb is not None:
        options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=config.data.buffer_mb << 20
        )
    first_step = 0 if spec.resume is None else spec.resume.step
    stream = functools.partial(open_stream, splits, settings, workers, first_step, spec.held_step)
    trainer = LocalTrainer if owns_cluster() else Trainer
    return trainer(
        run_worker,
        # By reference: the controller would import the model to read it.
        train_loop_config={
            "spec": [ray.put(spec)],
            "bins_per_block": config.optim.bins_per_block,
        },
        backend_config=ProcessGroup(
            max(1, round(collective_timeout(config.train.timeout_seconds))),
            gpus=config.train.gpus > 0,
        ),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees V1's
            num_workers=workers,
            use_gpu=config.train.gpus > 0,
            resources_per_worker=bundle(config.train.cpus, config.train.gpus),
            label_selector=selectors(config)[0] or None,
        ),
        run_config=RunConfig(
            name=f"attempt-{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}",
            **_ray_storage(config.run_dir / ".ray"),
            # `Attempts` decides what comes next. Ray Train would start a group of the same size
            # again, without limit, where there is no room for it or a node was preempted.
            failure_config=FailureConfig(  # type: ignore[call-arg]  # mypy sees V1's
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
        datasets={STREAM: stream},
        dataset_config=DataConfig(execution_options=options),
    )


def _ray_storage(folder: StoragePath) -> dict[str, Any]:
    """Return the arguments that make Ray Train keep its own files in `folder`."""
    if isinstance(folder, ObjectPath):
        filesystem, path = folder.filesystem
        return {"storage_path": path, "storage_filesystem": filesystem}
    return {"storage_path": str(folder)}
