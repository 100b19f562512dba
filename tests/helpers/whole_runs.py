"""Whole runs through `python -m jobs.train`, as a user starts them, and the files they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import omni

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROOT = Path(omni.__file__).parents[1]

TINY = """
data: {train: [TRAIN], dev: [DEV], test: [], loaders: 1, allow_absolute: true}
tokenizer: {vocab_size: 300}
model: {n_layer: 2, n_head: 2, n_embd: 64, stack: 4, dropout: 0.1, audio_dropout: 0.1}
optim: {bin_positions: 256, bins_per_step: 4, steps: 50, lr: 2.0e-3, warmup_steps: 5,
        ctc_weight: 0.5, ema: 0.9}
train: {log_every: 1, checkpoint_every: 7, precision: fp32, max_failures: 0}
eval: {every: 25, wer_utterances: 2}
"""


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def embedded(split: str, count: int) -> list[dict[str, Any]]:
    """Short rows of the embedded corpus, with absolute audio paths."""
    rows = [json.loads(line) for line in (ASSETS / f"{split}.jsonl").read_text().splitlines()]
    short = [row for row in rows if row["duration"] < 4][:count]
    return [{**row, "audio": str(ASSETS / row["audio"])} for row in short]


def command(config: Path, storage: Path | str, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jobs.train",
        "--config",
        str(config),
        "--run.name",
        "run",
        "--run.storage",
        str(storage),
        *overrides,
    ]


def run_job(config: Path, storage: Path | str, *overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(config, storage, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(run: Path) -> dict[int, float]:
    rows = lines(run / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    assert len(losses) == sum(row["kind"] == "train" for row in rows), "a step was logged twice"
    return losses


def ledger(run: Path) -> dict[int, tuple[Counter[int], Counter[int]]]:
    """Bins and utterances of each step, over all ranks."""
    steps: dict[int, tuple[Counter[int], Counter[int]]] = {}
    for path in (run / "ledger").glob("rank-*.jsonl"):
        for row in lines(path):
            bins, utterances = steps.setdefault(row["step"], (Counter(), Counter()))
            bins[row["bin"]] += 1
            utterances.update(row["utterances"])
    return steps
