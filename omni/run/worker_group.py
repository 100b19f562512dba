"""Build the Ray Train worker group of one attempt."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig

from omni.cluster.capacity import bundle, selectors
from omni.cluster.ray_init import owns_cluster
from omni.cluster.ray_internals.train import LocalTrainer, Trainer
from omni.cluster.timeouts import collective_timeout
from omni.run.process_group import ProcessGroup
from omni.run.train_worker import run_worker
from omni.storage.path import ObjectPath, StoragePath
from omni.stream.streams import STREAM, StreamConfig, Streams
from omni.train.worker_spec import WorkerSpec


def make_trainer(spec: WorkerSpec, workers: int, streams: Streams) -> Trainer:
    """Build the trainer of one attempt."""
    config = spec.config
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
        datasets={STREAM: streams},  # type: ignore[dict-item]  # read by `StreamConfig`
        dataset_config=StreamConfig(),
    )


def _ray_storage(folder: StoragePath) -> dict[str, Any]:
    """Return the arguments that make Ray Train keep its own files in `folder`."""
    if isinstance(folder, ObjectPath):
        filesystem, path = folder.filesystem
        return {"storage_path": path, "storage_filesystem": filesystem}
    return {"storage_path": str(folder)}
