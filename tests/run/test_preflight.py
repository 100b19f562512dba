"""What is refused before a run begins, on a real cluster, and how long one will take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from omni.config import Config, load_config
from omni.errors import ConfigError
from omni.plan.plan import Plan
from omni.run.estimate import duration, estimate
from omni.run.gpu_memory import Gpu, find_gpu
from omni.run.preflight import _look, _not_shared
from omni.run.rates import Cost
from omni.run.run import dry_run


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with three GPUs that only exist in Ray's books, and labels."""
    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "num_gpus": 1, "labels": {"pool": "encoder"}},
    )
    kind = {"accelerator_type:L4": 1}
    found.add_node(num_cpus=4, num_gpus=2, labels={"pool": "trainer"}, resources=kind)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def _config(tiny: Path, storage: Path, *settings: str) -> Config:
    place = [] if "--run.storage" in settings else ["--run.storage", str(storage)]
    return load_config(tiny, ["--run.name", "run", *place, *settings])


TOO_MANY = ["--train.workers", "4", "--train.gpus", "1"]
STARVED = ["--train.workers", "2", "--train.workers", "8", "--train.gpus", "1"]
STARVED += ["--encoder.gpus", "1", "--encoder.actors", "2"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (TOO_MANY, r"train\.workers 4\b.*\b1 GPU\b.*\b1 CPU\b.*\b3 GPUs\b"),
        (STARVED, r"encoder\.actors 2\b.*\b1 GPU\b.*\b0\.5 CPU\b.*train\.workers \[2, 8\]"),
        (["--encoder.weights", "/nowhere"], r"encoder\.weights: .*/nowhere\b"),
        (["--model.sequence_len", "128"], r"optim\.bin_positions: .*\b256\b.*\b128\b"),
        (["--run.storage", "/tmp/working_dir_files/_ray_pkg_1/runs"], "run.storage: /tmp/working"),
        (["--run.storage", "/proc/1/runs"], r"run\.storage: .*/proc/1/runs\b"),
    ],
)
def test_what_cannot_work_is_one_line(
    cluster: Cluster, tiny: Path, tmp_path: Path, settings: list[str], named: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        dry_run(_config(tiny, tmp_path, *settings))
    assert re.match(named, str(refused.value))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_a_block_through_and_leaves_nothing(
    cluster: Cluster, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(_config(tiny, tmp_path, "--data.cache", str(tmp_path / "cache")))
    out = capsys.readouterr().out
    assert re.search(r"\babout \d+(\.\d)? (s|min|h)\b.*-bound\b", out)
    assert re.search(r"\bmemory: .*\b\d+ MiB \(.*\bactivations \d+ MiB\b", out)
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob(".preflight*"))


def test_the_gpu_of_a_worker_is_known_by_the_name_that_ray_has(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    """A worker finds no GPU here to ask."""
    settings = ["--train.gpus", "1", "--train.labels", "{pool: trainer}"]
    assert find_gpu(_config(tiny, tmp_path, *settings)) == Gpu("L4", 24 << 30)


@pytest.mark.slow
def test_a_node_with_folders_of_its_own_is_found(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    if subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs the right to make mount namespaces")
    ray_program = Path(sys.executable).parent / "ray"
    start = f"{ray_program} start --address {cluster.address} --num-cpus 1 --block"
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {storage}; exec {start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len([n for n in ray.nodes() if n["Alive"]]) < 3:
            assert node.poll() is None
        with pytest.raises(ConfigError, match=r"^run\.storage: .*\bnode [0-9.]+"):
            dry_run(_config(tiny, storage))
    finally:
        node.terminate()
        node.wait()


def test_what_a_node_cannot_do_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    mark = tmp_path / "run" / ".preflight-1"
    said = _look(file / "run" / "mark", "word", None, {})
    assert said is not None and re.match(rf"run\.storage: .*{{node}}.*{file / 'run'}\b", said)
    said = _look(mark, "word", str(file / "cache"), {})
    assert said is not None and re.match(rf"data\.cache: .*{{node}}.*{file / 'cache'}\b", said)
    said = _look(mark, "word", None, {"encoder.weights": "/nowhere"})
    assert said is not None and re.match(r"encoder\.weights: .*{node}.*/nowhere\b", said)
    config = load_config(None, ["--run.storage", str(tmp_path), "--run.name", "run"])
    assert _look(mark, "word", str(tmp_path / "cache"), {"data.train": str(file)}) is None
    assert _not_shared(mark, "word", config) is None and not mark.exists()
    assert os.listdir(tmp_path / "cache") == []
    shutil.rmtree(tmp_path / "run")
    said = _not_shared(mark, "word", config)
    assert said is not None and re.match(rf"run\.storage: .*{{node}}.*{config.run_dir}\b", said)


def test_an_estimate_is_arithmetic() -> None:
    samples = np.full(10, 160_000)  # ten seconds each
    members = np.tile(np.arange(10, dtype=np.int32), 4)  # four epochs
    ends = np.array([5, 10, 15, 20])
    plan = Plan(members, np.arange(21) * 2, ends, 2, "")
    config = load_config(None, ["--optim.steps", "10", "--optim.bins_per_step", "2"])

    def reckon(
        config: Config = config, missing: float = 1.0, **settings: float | None
    ) -> list[str]:
        """Durations and limits, in the order in which the estimate names them."""
        how = {"decode_rate": 1e3, "encoder_rate": 40.0, "cores": None} | settings
        cost = Cost(0.2, 0.1)  # a step of two bins: 0.5 s, of 40 s of audio
        found = estimate(
            config, plan, samples, workers=1, encoders=1, missing=missing, block=cost, **how
        )
        return re.findall(r"\d+ s\b|\w+-bound", str(found))

    # 2.5 steps of an epoch at one second each, for the encoder; then 7.5 at half a second.
    assert reckon() == ["6 s", "trainer-bound", "encoder-bound", "2 s"]
    assert reckon(missing=0.0) == ["5 s", "trainer-bound"]
    assert reckon(decode_rate=10.0, missing=1.0) == ["9 s", "decode-bound"]
    uncached = load_config(None, ["--optim.steps", "10", "--data.cache", "null"])
    assert reckon(uncached) == ["10 s", "encoder-bound"]
    changed = load_config(None, ["--optim.steps", "10", "--augment.freq_masks", "2"])
    assert reckon(changed) == reckon(uncached), "what is augmented is encoded in every epoch"
    half = load_config(None, ["--optim.steps", "10", "--augment.speed", "[1.0, 1.1]"])
    assert reckon(half, encoder_rate=20.0) == reckon(uncached)
    # One core does all of it: 0.5 + 1 + 0.04 s a step.
    assert reckon(uncached, cores=1.0) == ["15 s", "encoder-bound"]
    assert [duration(s) for s in (12, 240, 12_600)] == ["12 s", "4 min", "3.5 h"]
