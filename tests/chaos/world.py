"""A Ray cluster of several nodes on this machine, a training run on it, and means to hurt both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

import omni
from omni.metrics.run_files import read_events

ROOT = Path(omni.__file__).parents[1]
ASSETS = ROOT / "omni" / "assets" / "prompts-en"
INJECT = Path(__file__).parent / "inject"
NODE_CPUS = 3
"""CPUs of a node; one more for each stream after the first."""
PATIENCE_SECONDS = 240.0

CONFIG = """
run: {{name: run, storage: {storage}, grace_seconds: 60}}
data: {{train: [{train}], dev: [{dev}], test: [], loaders: {streams}, cache: {cache},
       streams: {streams}, window_utterances: {window}}}
encoder: {{actors: {streams}}}
tokenizer: {{vocab_size: 300}}
model: {{n_layer: 2, n_head: 2, n_embd: 64, stack: 4, dropout: 0.1, audio_dropout: 0.1}}
optim: {{bin_positions: 256, bins_per_step: 4, steps: {steps}, lr: 1.0e-3, warmup_steps: 20,
        ctc_weight: 0.5, ema: 0.9}}
train: {{log_every: 1, checkpoint_every: 20, precision: fp32, max_failures: 5,
        timeout_seconds: 30, workers: {workers}}}
eval: {{every: 400, wer_utterances: 2}}
"""


class ChaosError(AssertionError):
    """The run did not survive what omni says it survives."""


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """60 training and 8 dev prompts, copied, so that their storage can be taken away."""
    manifests = []
    for split, count in (("train", 60), ("dev", 8)):
        rows = [json.loads(line) for line in (ASSETS / f"{split}.jsonl").read_text().splitlines()]
        chosen = [row for row in rows if row["duration"] < 4][:count]
        home = folder / split
        home.mkdir(parents=True)
        for row in chosen:
            shutil.copy(ASSETS / row["audio"], home / Path(row["audio"]).name)
            row["audio"] = Path(row["audio"]).name
        path = home / "manifest.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        manifests.append(path)
    return manifests[0], manifests[1]


class Disk:
    """Storage behind a link: it can be taken away, and be filled up where a mount is allowed."""

    def __init__(self, base: Path, megabytes: int = 64) -> None:
        self.link, self._real = base / "disk", base / "real"
        self._real.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(self._real)],
            capture_output=True,
        )
        self.bounded = mounted.returncode == 0
        self.link.symlink_to(self._real)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self._point(self._real.with_name("nowhere"))
        try:
            yield
        finally:
            self._point(self._real)

    @contextlib.contextmanager
    def full(self, leave: int) -> Iterator[None]:
        """All but `leave` bytes taken: lines of text have room, a checkpoint has not."""
        filler = self._real / "filler"
        free = shutil.disk_usage(self._real).free
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - leave))
        try:
            yield
        finally:
            filler.unlink()

    def _point(self, target: Path) -> None:
        new = self.link.with_name("link.new")
        new.symlink_to(target)
        os.replace(new, self.link)

    def close(self) -> None:
        if self.bounded:
            subprocess.run(["umount", "-l", str(self._real)], capture_output=True)


class World:
    """workers: what `train.workers` says; nodes: how many the cluster has besides its head.

    streams: each with a loader and an encoder. window: `data.window_utterances`.
    """

    def __init__(
        self,
        base: Path,
        *,
        steps: int,
        workers: str,
        nodes: int,
        cached: bool = True,
        streams: int = 1,
        window: int = 262_144,
    ) -> None:
        self.base, self.nodes, self._cpus = base, nodes, NODE_CPUS + streams - 1
        self.orders = base / "orders"
        self.orders.mkdir()
        self.disk = Disk(base)
        train, dev = write_corpus(self.disk.link / "corpus")
        self.config = base / "chaos.yaml"
        self.storage = self.disk.link / "runs"
        text = CONFIG.format(
            storage=self.storage,
            train=train,
            dev=dev,
            steps=steps,
            workers=workers,
            cache="auto" if cached else "null",
            streams=streams,
            window=window,
        )
        self.config.write_text(text)
        self.run_dir = self.storage / "run"
        self.log = (base / "job.log").open("ab")
        self.job: subprocess.Popen[bytes] | None = None
        self.cluster: Cluster | None = None

    # -- the cluster ---------------------------------------------------------------------------

    def start_cluster(self) -> None:
        os.environ["CHAOS_DIR"] = str(self.orders)
        os.environ["PYTHONPATH"] = f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(self.nodes):
            self.add_node()

    def add_node(self) -> None:
        assert self.cluster is not None
        self.cluster.add_node(num_cpus=self._cpus)

    def kill_cluster(self) -> None:
        """Every process of every node at once, as when the power goes."""
        assert self.cluster is not None
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.cluster = None

    def worker_nodes(self) -> list[Any]:
        assert self.cluster is not None
        return list(self.cluster.worker_nodes)

    # -- the job -------------------------------------------------------------------------------

    def start_job(self, address: bool = True) -> None:
        self.job = self._start(address)

    def second_job(self) -> int:
        """Exit code of the same command once more, beside the one that trains."""
        second = self._start(address=True)
        try:
            return second.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            second.kill()
            second.wait()
            raise ChaosError("a second driver of the run did not end") from None

    def _start(self, address: bool) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
        if address:
            assert self.cluster is not None
            environment["RAY_ADDRESS"] = self.cluster.address
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.train", "--config", str(self.config)],
            cwd=ROOT,
            env=environment,
            stdout=self.log,
            stderr=self.log,
        )

    def job_ended(self, seconds: float) -> int:
        """Exit code of the job, which must end within `seconds`."""
        assert self.job is not None
        try:
            return self.job.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ChaosError(f"the job did not end within {seconds:.0f} s") from None

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row.get("kind") == "train":
                    return int(row["step"])
        return 0

    def events(self) -> list[dict[str, Any]]:
        try:
            return read_events(self.run_dir)
        except OSError:
            return []

    def finished(self) -> bool:
        return (self.run_dir / "summary.json").exists()

    def wait(
        self, until: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS
    ) -> float:
        """Seconds until something is so. Raises ChaosError when the job ends or time is up."""
        began = time.monotonic()
        while not until():
            if self.job is not None and self.job.poll() is not None and not self.finished():
                raise ChaosError(f"the job ended with {self.job.returncode} before {what}")
            if time.monotonic() - began > seconds:
                raise ChaosError(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.05)
        return time.monotonic() - began

    # -- its processes -------------------------------------------------------------------------

    def processes(self, title: str) -> list[psutil.Process]:
        """Worker processes of the cluster by their Ray title."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if line.startswith("ray::") and title in line:
                    found.append(process)
        return found

    def encoders(self) -> list[psutil.Process]:
        return self.processes("_EncodeActor")

    def trainers(self) -> list[psutil.Process]:
        return self.processes("RayTrainWorker")

    def order(self, kind: str, process: psutil.Process) -> None:
        """Ask a process for a fault of its own (see inject/sitecustomize.py)."""
        (self.orders / f"{kind}-{process.pid}").touch()

    def close(self) -> None:
        if self.job is not None and self.job.poll() is None:
            self.job.kill()
            self.job.wait()
        if self.cluster is not None:
            with contextlib.suppress(Exception):
                self.kill_cluster()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.disk.close()
        self.log.close()
