"""Run training jobs as a user does, in their own process, and time them by their metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.bench.process_tree import ProcessTree
from omni.config import Config
from omni.metrics.run_files import read_json_lines
from omni.run.prepare import prepare

_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class JobRun:
    """Hold the metrics that a job wrote. steps: one row of metrics.jsonl for each step."""

    steps: list[dict[str, Any]]
    summary: dict[str, Any]
    wall_seconds: float
    """Including the start of Ray and the scoring at the end."""
    cpu_at_step: dict[int, float]
    """CPU seconds of all processes, Ray's included, when a step was found in the metrics."""
    cpu_seconds: float
    """CPU seconds of all processes at the end of the job."""

    @property
    def samples_per_cpu_second(self) -> float:
        """Return utterances per CPU second from the first step that was found to the last."""
        first, last = min(self.cpu_at_step), max(self.cpu_at_step)
        trained: float = sum(row["utterances"] for row in self.steps if first < row["step"] <= last)
        return trained / (self.cpu_at_step[last] - self.cpu_at_step[first])

    def over(self, first: int, last: int) -> dict[str, float]:
        """Add up times and counts over the steps after `first` up to `last`, counted from 1.

        rate: audio seconds per second. waited: the share of the time spent waiting for data.
        """
        rows = [row for row in self.steps if first < row["step"] <= last]
        seconds = sum(row["step_seconds"] for row in rows)
        audio = sum(r["audio_seconds_per_second"] * r["step_seconds"] for r in rows)
        waited = sum(r["data_wait_fraction"] * r["step_seconds"] for r in rows)
        return {
            "seconds": seconds,
            "audio_seconds": audio,
            "utterances": sum(row["utterances"] for row in rows),
            "rate": audio / seconds,
            "waited": waited / seconds,
            "encode_seconds": sum(row["encode_seconds"] for row in rows),
        }


def for_timing(config: Config, steps: int) -> Config:
    """Change the config to train for `steps` steps, log each, and evaluate hardly anything."""
    data = config.data.model_copy(update={"test": []})
    optim = config.optim.model_copy(update={"steps": steps})
    train = config.train.model_copy(update={"log_every": 1, "checkpoint_every": steps})
    evaluation = config.eval.model_copy(
        update={"every": steps, "max_utterances": 1, "wer_utterances": 1, "patience": None}
    )
    changed = {"data": data, "optim": optim, "train": train, "eval": evaluation}
    return config.model_copy(update=changed)


def steps_of_epochs(config: Config, epochs: int) -> list[int]:
    """Return the step in which each of the first `epochs` epochs ends."""
    optim = config.optim.model_copy(update={"steps": 1})
    while True:
        plan = prepare(config.model_copy(update={"optim": optim})).splits["train"].plan
        if len(plan.epoch_ends) > epochs:
            return [-(-int(end) // optim.bins_per_step) for end in plan.epoch_ends[:epochs]]
        optim = optim.model_copy(update={"steps": 2 * optim.steps})


def run_job(config: Config) -> JobRun:
    """Train in a new folder, and so with an empty cache. The config logs every step.

    Raises RuntimeError with the end of the job's output when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as folder:
        run = config.run.model_copy(update={"storage": folder})
        inside = config.model_copy(update={"run": run})
        path = Path(folder) / "config.yaml"
        path.write_text(inside.to_yaml())
        run_dir = Path(str(inside.run_dir))
        metrics, output = run_dir / "metrics.jsonl", Path(folder) / "output"
        began = time.monotonic()
        with output.open("w") as file:
            job = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", "--config", str(path)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            tree = ProcessTree(job.pid)
            used: dict[int, float] = {}
            while job.poll() is None:
                now = tree.cpu_seconds()
                if steps := sum(b'"kind": "train"' in line for line in _lines(metrics)):
                    used.setdefault(steps, now)
                time.sleep(_LOOK_SECONDS)
        wall = time.monotonic() - began
        if job.returncode:
            raise RuntimeError(f"the training job failed: {output.read_text()[-500:]}")
        rows = [row for row in read_json_lines(metrics) if row["kind"] == "train"]
        summary = json.loads((run_dir / "summary.json").read_text())
        return JobRun(rows, summary, wall, used, tree.cpu_seconds())


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []
