"""Private APIs of Ray Train."""

from __future__ import annotations

from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.train._internal.utils import get_address_and_port
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Trainer

__all__ = ["LocalTrainer", "Trainer", "free_address", "is_start_timeout"]

free_address = get_address_and_port
"""Find the address of this node, and a port that is free there."""


def is_start_timeout(error: object) -> bool:
    """Tell whether a worker group was not placed in time."""
    return isinstance(error, WorkerGroupStartupTimeoutError)


class LocalWorkerGroup(WorkerGroup):
    """Start workers in idle processes, without a runtime environment: see `LocalTrainer`."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return {}


class LocalController(TrainController):
    """Control workers of a cluster that the driver has started."""

    worker_group_cls = LocalWorkerGroup


class LocalTrainer(Trainer):
    """Start controller and workers in idle processes of a cluster that this process has started.

    Ray Train would give them, and with the controller every process of the run, a runtime
    environment of environment variables. Each process would then start an interpreter twice, and
    none could be one that the cluster has started in advance. Here the variables must be set before
    Ray starts.
    """

    def _create_default_callbacks(self) -> Any:
        """Leave out the process that would end the workers if this one, and not Ray, died."""
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        controller = ray.remote(num_cpus=0, label_selector=here)(LocalController)
        actor: Any = controller.remote(**arguments)
        ray.get(actor.run.remote())
        return ray.get(actor.get_result.remote())
