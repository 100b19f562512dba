"""How many workers find room beside their encoders."""

from __future__ import annotations

import pytest

from omni.train.elastic import Node, workers_that_fit

GPU_NODE = {"GPU": 8.0, "CPU": 64.0, "memory": 1e12}


def _fit(nodes: list[Node], least: int = 1, most: int = 64, **settings: object) -> int:
    defaults = {
        "worker": {"CPU": 1.0, "GPU": 1.0},
        "encoder": {"CPU": 0.5, "GPU": 0.5},
        "encoders": 4,
        "loader": {"CPU": 1.0},
        "loaders": 2,
    }
    return workers_that_fit(nodes, least=least, most=most, **{**defaults, **settings})  # type: ignore[arg-type]


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
