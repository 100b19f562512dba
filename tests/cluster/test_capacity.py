"""How many workers find room beside their encoders."""

from __future__ import annotations

import re

import pytest

from omni.cluster.capacity import Demand, Node, shortage, workers_that_fit

GPU_NODE = {"GPU": 8.0, "CPU": 64.0, "memory": 1e12}


def _fit(nodes: list[Node], least: int = 1, most: int = 64, **settings: object) -> int:
    return workers_that_fit(nodes, _demand(**settings), least, most)


def _demand(**settings: object) -> Demand:
    defaults = {
        "worker": {"CPU": 1.0, "GPU": 1.0},
        "encoder": {"CPU": 0.5, "GPU": 0.5},
        "encoders": 4,
        "loaders": 2,
    }
    return Demand(**{**defaults, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([GPU_NODE], 6),
        ([GPU_NODE, GPU_NODE], 14),
        ([GPU_NODE, {"CPU": 64.0}], 6),
        ([{"GPU": 2.0, "CPU": 8.0}], 1),  # four encoders leave nothing: one does
        ([{"GPU": 1.0, "CPU": 8.0}], 0),
        ([], 0),
    ],
)
def test_workers_leave_room_for_encoders(nodes: list[dict[str, float]], expected: int) -> None:
    found = [Node(str(i), resources) for i, resources in enumerate(nodes)]
    assert _fit(found) == expected


def test_a_node_that_goes_does_not_count() -> None:
    nodes = [Node("a", GPU_NODE), Node("b", GPU_NODE, leaving=True)]
    assert _fit(nodes) == 6


def test_bundles_do_not_span_nodes() -> None:
    halves = [Node(str(i), {"CPU": 1.5}) for i in range(6)]
    bundles = {"worker": {"CPU": 1.0}, "encoder": {"CPU": 0.5}, "encoders": 1, "loaders": 1}
    assert _fit(halves, **bundles) == 4  # two hold loaders; 9 CPUs would be enough for six
    assert _fit(halves, least=5, **bundles) == 0


def test_no_more_than_asked_for() -> None:
    assert _fit([Node("a", GPU_NODE)], most=3) == 3


def test_pools_stay_on_nodes_with_their_labels() -> None:
    nodes = [
        Node("a", {"GPU": 2.0, "CPU": 16.0}, labels={"pool": "encoder"}),
        Node("b", GPU_NODE, labels={"pool": "trainer", "rack": "1"}),
        Node("c", GPU_NODE),
    ]
    labels = {"worker_labels": {"pool": "trainer"}, "encoder_labels": {"pool": "encoder"}}
    assert _fit(nodes, **labels) == 8
    assert _fit(nodes, **labels, encoders=6) == 8, "four encoders find room: at least one is enough"
    assert _fit(nodes, worker_labels={"pool": "trainer", "rack": "2"}) == 0
    assert _fit(nodes, worker_labels={"pool": "trainer"}) == 8, "encoders go where there is room"


@pytest.mark.parametrize(
    ("workers", "settings", "named"),
    [
        ((6, 6), {}, None),
        ((7, 7), {}, r"encoder\.actors 4\b.*\b0\.5 GPU\b.*\b0\.5 CPU\b.*train\.workers\b"),
        ((7, 7), {}, r"encoder\.actors 4\b.*train\.workers\b.*\b2\b.*\b8 GPUs\b.*\b64 CPUs\b"),
        ((1, 64), {}, None),
        ((8, 64), {}, r"encoder\.actors 4\b.*train\.workers \[8, 64\]"),
        ((9, 9), {}, r"train\.workers 9\b.*\b1 GPU\b.*\b1 CPU\b.*\b8 GPUs\b"),
        ((1, 1), {"worker": {"CPU": 99.0}}, r"train\.cpus\b.*\b99\b"),
        ((1, 1), {"encoder_labels": {"pool": "e"}}, r"encoder\.labels\b.*\bpool=e\b"),
    ],
)
def test_a_shortage_is_named(
    workers: tuple[int, int], settings: dict[str, object], named: str | None
) -> None:
    found = shortage([Node("a", GPU_NODE)], _demand(**settings), *workers)
    assert found is None if named is None else re.match(named, found or "")


def test_a_cluster_without_gpus_is_named() -> None:
    said = shortage([Node("a", {"CPU": 64.0})], _demand(), 1, 1)
    assert said is not None
    assert re.match(r"train\.gpus\b.*\b1 GPU\b.*\b1 CPU\b.*\b64 CPUs\b", said)
