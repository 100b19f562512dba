"""Private APIs of Ray that omni needs, all of them. They are those of Ray 2.60."""

from __future__ import annotations

import os
import time
from typing import Any

import grpc
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.gcs_utils import create_gcs_channel
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators import actor_pool_map_operator

RELEASE = "2.60"
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05  # seconds

if ray.__version__.split(".")[:2] != RELEASE.split("."):
    raise RuntimeError(
        f"ray {ray.__version__}: expected {RELEASE}.x, whose internals omni uses: "
        f"pip install 'ray[default,data,train]=={RELEASE}.*'"
    )


def draining_node_ids() -> set[str]:
    """Return the ids of nodes that are announced to be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def autoscaler_limits() -> dict[str, float] | None:
    """Return the most resources that an autoscaler would bring; None without an autoscaler."""
    limits = ray._private.state.state.get_max_resources_from_cluster_config()
    return None if limits is None else {name: float(amount) for name, amount in limits.items()}


def can_reach(address: str, seconds: float) -> bool:
    """Check whether a cluster answers at HOST:PORT. Left to itself, Ray tries for nine minutes."""
    channel = create_gcs_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def longest_socket_name() -> str:
    """Return a path as long as that of the sockets of a cluster that this process would start."""
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return os.path.join(get_default_ray_temp_dir(), session, "sockets", "plasma_store")


class SchedulerWorkarounds(ExecutionCallback):
    """Change behaviour of Ray Data's scheduler that it has no settings for."""

    _progress = -1
    _pause = _SHORTEST_PAUSE

    def before_execution_starts(self, executor: Any) -> None:
        """Let encoders work on a node that is draining.

        Ray Data gives them no more blocks. Where they are the only encoders, the trainers never get
        the blocks that end their step, and write no checkpoint before the node goes.
        """
        actor_pool_map_operator.get_draining_nodes = dict  # type: ignore[attr-defined]

    def on_execution_step(self, executor: Any) -> None:
        """Back off while the scheduler is idle.

        While every stage waits for the trainer no task is active, and the scheduler then loops
        without waiting: 40 % of a core that two-core machines need for training.
        """
        metrics = [operator.metrics for operator in executor._topology]
        progress = sum(m.num_tasks_submitted + m.num_outputs_of_finished_tasks for m in metrics)
        if progress == self._progress:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _SHORTEST_PAUSE
        self._progress = progress
