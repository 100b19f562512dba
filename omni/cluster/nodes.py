"""What Ray says about the cluster that a run is on."""

from __future__ import annotations

import ray

from omni.cluster.capacity import Bundle, Node


def nodes() -> list[Node]:
    """The cluster's living nodes; `leaving`: announced to be taken away."""
    draining = ray._private.state.state.get_draining_nodes()
    return [
        Node(
            n["NodeID"],
            n["Resources"],
            n["NodeID"] in draining,
            n.get("Labels") or {},
            n["NodeManagerAddress"],
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def reachable() -> Bundle | None:
    """What an autoscaler could make of the cluster at most; None where there is none."""
    found = ray._private.state.state.get_max_resources_from_cluster_config()
    return None if found is None else {name: float(much) for name, much in found.items()}
