"""Private APIs of Ray Core."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import grpc
import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated import gcs_pb2

_messages: Any = gcs_pb2  # Generated, without types.


def draining_node_ids() -> set[str]:
    """Return the ids of nodes that are announced to be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def used_by_other_jobs() -> dict[str, dict[str, float]]:
    """Return the resources that other jobs hold on each node, by its id.

    Those of their placement groups and of actors outside of these; tasks come and go.
    """
    accessor = ray._private.state.state._connect_and_get_accessor()
    mine = ray.get_runtime_context().get_job_id()
    used: dict[str, dict[str, float]] = {}

    def add(node: bytes, amounts: Mapping[str, float]) -> None:
        of_node = used.setdefault(node.hex(), {})
        for name, amount in amounts.items():
            of_node[name] = of_node.get(name, 0.0) + amount

    for data in accessor.get_placement_group_table():
        group = _messages.PlacementGroupTableData.FromString(data)
        if group.state != group.CREATED or group.creator_job_id.hex() == mine:
            continue
        for bundle in group.bundles:
            add(bundle.node_id, bundle.unit_resources)
    for data in accessor.get_actor_table(None, "ALIVE"):
        actor = _messages.ActorTableData.FromString(data)
        if actor.job_id.hex() != mine and not actor.placement_group_id.strip(b"\xff"):
            add(actor.address.node_id, actor.required_resources)
    return used


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


def object_store_folders() -> dict[str, str]:
    """Return the folders of this node's object store: `plasma` in memory, `fallback` for spilling.

    Read from the command line of the raylet that started this process; empty elsewhere.
    """
    folders = {}
    for argument in psutil.Process(os.getppid()).cmdline():
        for kind in ("plasma", "fallback"):
            if argument.startswith(flag := f"--{kind}_directory="):
                folders[kind] = argument.removeprefix(flag)
    return folders
