"""Private APIs of Ray Core."""

from __future__ import annotations

import os

import grpc
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.gcs_utils import create_gcs_channel


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
