"""The number of workers follows the cluster without a restart for every node."""

from __future__ import annotations

import pytest
import ray.exceptions
import ray.train

from omni.cluster.ray_internals.train import WorkerGroupStartupTimeoutError
from omni.run.failures import is_preempted, is_without_room
from omni.run.resize import ResizePolicy

POLL = 2.0  # seconds


def _restarts(policy: ResizePolicy, capacities: list[int], workers: int) -> list[tuple[int, int]]:
    """(poll, workers) of each change, when the cluster is polled with these capacities."""
    changes = []
    for number, capacity in enumerate(capacities):
        if policy.poll(capacity, workers, number * POLL):
            workers = capacity
            policy.restart()
            changes.append((number, workers))
    return changes


def test_ten_nodes_that_arrive_one_by_one_cost_one_restart() -> None:
    arriving = [nodes for nodes in range(2, 12) for _ in range(10)]  # one every 20 s
    waited = _restarts(ResizePolicy(64, 60), arriving + [11] * 60, workers=1)
    assert waited == [(120, 11)], "60 s after the last one"
    complete = _restarts(ResizePolicy(11, 60), arriving + [11] * 60, workers=1)
    assert complete == [(92, 11)], "at once, since no more are wanted"


def test_lost_room_is_given_up_at_once() -> None:
    assert _restarts(ResizePolicy(4, 600), [4, 4, 3, 3, 3, 3], workers=4) == [(4, 3)]


def test_a_short_change_is_none() -> None:
    assert _restarts(ResizePolicy(4, 0), [2, 2, 1, 1, 2, 3, 3, 2, 2], workers=2) == []
    assert _restarts(ResizePolicy(4, 0), [2, 3, 3, 3, 3], workers=2) == [(3, 3)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)), (True, False)),
        (ray.train.ControllerError(RuntimeError("x")), (False, False)),
        (ray.train.WorkerGroupError("x", {0: ray.exceptions.RayActorError()}), (False, False)),
        (
            ray.train.WorkerGroupError("x", {1: ray.exceptions.RayActorError(preempted=True)}),
            (False, True),
        ),
        (SystemExit(1), (False, False)),
    ],
)
def test_lack_of_room_and_preemption_are_no_faults_of_the_run(
    error: BaseException, expected: tuple[bool, bool]
) -> None:
    assert (is_without_room(error), is_preempted(error)) == expected
