"""A run on a cluster that shrinks, or is used by others, at the wrong moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from jobs import audit
from omni.cluster.capacity import cluster_nodes, free_nodes
from omni.config import load_config
from omni.metrics.run_files import read_events
from omni.run import attempts
from omni.run.run import train
from tests.helpers.whole_runs import ROOT

pytestmark = pytest.mark.slow

OTHER_JOB = """
import ray, time
from ray.util.placement_group import placement_group
ray.init()
group = placement_group([{"CPU": 3}])
ray.get(group.ready())

@ray.remote(num_cpus=0.5)
class Actor:
    def ready(self): pass

actor = Actor.remote()
ray.get(actor.ready.remote())
print("holds", flush=True)
time.sleep(600)
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with room for one worker of 3.5 CPUs beside an encoder and two loaders."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 6})
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    ray.shutdown()
    found.shutdown()


def test_room_that_is_lost_between_choosing_and_starting_costs_one_timeout(
    tiny: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = [cluster.add_node(num_cpus=4)]
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    make, asked = attempts.make_trainer, []

    def make_late(spec: Any, workers: int, *more: Any) -> Any:
        asked.append(workers)
        if doomed:
            cluster.remove_node(doomed.pop(), allow_graceful=False)
        return make(spec, workers, *more)

    monkeypatch.setattr(attempts, "make_trainer", make_late)
    overrides = ["--run.storage", str(tmp_path), "--run.name", "run", "--train.cpus", "3.5"]
    overrides += ["--train.workers", "[1,2]", "--encoder.cpus", "0.5"]
    train(load_config(str(tiny), overrides))
    run = tmp_path / "run"
    events = read_events(run)
    assert asked == [2, 1]
    assert [e["workers"] for e in events if e["event"] == "no room"] == [2]
    assert [e["workers"] for e in events if e["event"] == "attempt"] == [1]
    assert not [e for e in events if e["event"] == "failure"], "train.max_failures is 0 here"
    assert audit.main([str(run)]) == 0


def test_what_another_job_holds_is_no_room(cluster: Cluster, tiny: Path) -> None:
    ray.init(address=cluster.address)
    overrides = ["--train.workers", "[1,4]", "--encoder.cpus", "0.5", "--encoder.actors", "1"]
    driver = object.__new__(attempts.Attempts)  # The rest of it needs a run that is prepared.
    driver._config = load_config(str(tiny), overrides)
    mine = ray.util.placement_group([{"CPU": 1}])
    ray.get(mine.ready())
    [node] = free_nodes()
    assert node.resources["CPU"] == 6, "the own job's share can be used again"
    assert driver._choose_workers() == 3, "beside an encoder, a loader and one to spare"
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_JOB], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "holds\n"
        assert [n.resources["CPU"] for n in free_nodes()] == [2.5]
        assert [n.resources["CPU"] for n in cluster_nodes()] == [6]
        assert driver._choose_workers() == 1
    finally:
        other.kill()
        other.wait()
