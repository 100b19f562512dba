"""Find nodes that are not in order, on clusters whose nodes are processes of one machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from omni.cluster.capacity import Node, cluster_nodes
from omni.cluster.node_check import Limits, _Check, check_nodes
from omni.cluster.node_probe import _wrong_product
from tests.cluster.test_gpu_health import LOST

SOON = Limits(reduce=5.0, grace=5.0)
"""A process that is stopped, or waits for one that is, need not cost a minute here."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, and a node on whose PATH is an `nvidia-smi` that prints what it prints of a lost GPU.

    Its GPU exists in Ray's books only.
    """
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{LOST}'\nexit 255\n")
    program.chmod(0o755)
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    found.add_node(num_cpus=2, num_gpus=1, labels={"name": "lost"}, env_vars=path)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def named(name: str) -> Node:
    [node] = [node for node in cluster_nodes() if node.labels.get("name") == name]
    return node


def test_a_node_with_a_lost_gpu_is_named_with_the_reason(cluster: Cluster) -> None:
    nodes, lost = cluster_nodes(), named("lost")
    # The probe takes no GPU: torch would not find it, and that is not what is tested.
    report = check_nodes(nodes, [node.id for node in nodes], {node.id: 0 for node in nodes})
    assert set(report.faults) == {lost.id} and report.apart is None
    assert "255" in report.faults[lost.id] and LOST in report.faults[lost.id]
    # A machine with a full disk or little /dev/shm is remarked on too, once for each node.
    assert sum("1 GPU" in note for note in report.notes) == 1


def test_a_process_that_stops_before_the_sum_is_named_within_the_limit(cluster: Cluster) -> None:
    nodes, stopped = cluster_nodes(), named("lost")
    check = _Check(nodes, None, SOON)
    with check.probes():
        check.collect_facts()
        check.compute()
        assert check.faults == {}, "a run without GPUs does not ask for their health"
        probe = check._probes[stopped.id]
        pid = ray.get(probe.__ray_call__.remote(lambda self: os.getpid()))
        os.kill(pid, signal.SIGSTOP)
        check.add_up([node.id for node in nodes])
    assert set(check.faults) == {stopped.id} and "5 s" in check.faults[stopped.id]


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert _wrong_product("cpu") is None
    eye = torch.eye

    def other(*args: int, device: str) -> torch.Tensor:
        flipped = eye(*args, device=device)
        flipped[3, 5] = 1e-3
        return flipped

    monkeypatch.setattr(torch, "eye", other)
    assert "wrong" in (_wrong_product("cpu") or "")
    assert (_wrong_product("cuda:99") or "").startswith("cuda:99: ")


# -- slow --------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    """A head and two nodes: one whose collectives are told to use a network that is not there."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    wrong = {"GLOO_SOCKET_IFNAME": "eth77"}
    found.add_node(num_cpus=1, labels={"name": "deaf"}, env_vars=wrong)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.slow
def test_a_node_without_a_network_is_found_by_pairs(three: Cluster) -> None:
    nodes, deaf = cluster_nodes(), named("deaf")
    ids = [node.id for node in nodes]
    report = check_nodes(nodes, ids, limits=SOON)
    assert set(report.faults) == {deaf.id} and report.apart is None
    assert "eth77" in report.faults[deaf.id]
    alone = next(node for node in nodes if node.id != deaf.id)
    report = check_nodes([alone, deaf], ids, limits=SOON)
    assert report.faults == {} and report.apart is not None, "of two, either may be the reason"
