"""A run on a cluster of which one node is not in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from jobs import audit
from omni.cluster.capacity import cluster_nodes
from omni.config import load_config
from omni.errors import ConfigError
from omni.metrics.run_files import read_events
from omni.run.run import dry_run, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, dict[str, int]]]:
    """A head, a larger node whose packages say that they are another torch, and their raylets."""
    packages = tmp_path_factory.mktemp("packages")
    info = packages / "torch-2.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    root = Path(__file__).parents[2]
    path = {"PYTHONPATH": f"{packages}:{root}"}
    other = found.add_node(num_cpus=16, labels={"name": "other"}, env_vars=path)
    found.wait_for_nodes()
    raylets = {
        name: node.all_processes["raylet"][0].process.pid
        for name, node in (("head", found.head_node), ("other", other))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address)
        yield found, raylets
    ray.shutdown()
    found.shutdown()


def titles(raylet: int) -> set[str]:
    """Titles of a node's processes, which name what they run."""
    found = set()
    for child in psutil.Process(raylet).children(recursive=True):
        try:
            found.add(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return {title for title in found if title.startswith("ray::")}


def test_a_run_leaves_out_a_node_with_another_torch_and_uses_the_others(
    tiny: Path, tmp_path: Path, cluster: tuple[Cluster, dict[str, int]]
) -> None:
    seen: dict[str, set[str]] = {name: set() for name in cluster[1]}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for name, raylet in cluster[1].items():
                seen[name] |= titles(raylet)

    watcher = threading.Thread(target=watch)
    watcher.start()
    place = ["--run.storage", str(tmp_path), "--run.name", "run", "--encoder.cpus", "0.5"]
    try:
        train(load_config(str(tiny), place))
    finally:
        done.set()
        watcher.join()
    [other] = [node for node in cluster_nodes() if node.labels.get("name") == "other"]
    events = read_events(tmp_path / "run")
    [left] = [event for event in events if event["event"] == "node left out"]
    assert left["node"] == other.id
    here = metadata.version("torch").partition("+")[0]
    assert f"torch is 2.0.0 there and {here} here" in left["reason"]
    used = {node for event in events if event["event"] == "attempt" for node in event["nodes"]}
    assert used and other.id not in used
    stages = {
        name: {t for t in found if "Batches" in t or "Range" in t} for name, found in seen.items()
    }
    assert stages["head"], "stages are seen by their titles"
    assert not stages["other"], "it has 16 idle CPUs, and no stage runs there"
    assert audit.main([str(tmp_path / "run")]) == 0


def test_without_room_on_the_others_the_node_is_in_the_error(
    tiny: Path, tmp_path: Path, cluster: tuple[Cluster, dict[str, int]]
) -> None:
    place = ["--run.storage", str(tmp_path), "--run.name", "full", "--train.workers", "6"]
    with pytest.raises(ConfigError, match=r"train\.workers 6.* left out: node .*torch is 2\.0\.0"):
        dry_run(load_config(str(tiny), place))
    assert not (tmp_path / "full").exists()


def test_nodes_that_the_settings_exclude_are_not_asked(
    tiny: Path,
    tmp_path: Path,
    cluster: tuple[Cluster, dict[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    [other] = [node for node in cluster_nodes() if node.labels.get("name") == "other"]
    place = ["--run.storage", str(tmp_path), "--run.name", "run", "--encoder.cpus", "0.5"]
    dry_run(load_config(str(tiny), [*place, "--run.exclude_nodes", other.id]))
    assert "1 node checked" in capsys.readouterr().out
