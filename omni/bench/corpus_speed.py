"""Measure the time and the driver's memory to index and to plan large corpora."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni.bench.prepared_run import in_temporary_storage, progress
from omni.bench.timing import Result, describe_machine
from omni.config import Config
from omni.corpus.index import build_index
from omni.corpus.manifest import manifest_path
from omni.corpus.sources import Options
from omni.plan.plan import make_plan
from omni.run.prepare import prepare

_ROWS = 100_000
_PLANNED = 10_000_000
# A large run has about this many bins per step.
_BINS_PER_STEP = 64


def bench_corpus(config: Config, rows: int = _ROWS, planned: int = _PLANNED) -> Result:
    """Run the `corpus` suite: index `rows` files with jobs.index, and plan `planned` utterances.

    The files are links to those of the embedded corpus. Each measurement has a process of its own,
    so that its peak memory is its own too.
    """
    result = Result("corpus", describe_machine(torch.device("cpu"), config.train.threads))
    with in_temporary_storage(config) as inside:
        folder = Path(inside.run.storage)
        progress(f"writing a manifest of {rows:,} files")
        manifest = repeat_files(folder / "corpus", rows)
        progress("indexing: jobs.index, and one process without Ray")
        index = folder / "index"
        job = alone(_index, manifest, index)
        result.add("jobs.index", rows / job.seconds, "rows/s", f"{job.seconds:.0f} s in all")
        result.add("its driver", job.peak_gb, "GB", "at most")
        one = alone(_measure, manifest)
        result.add("one process", rows / one.seconds, "rows/s", "one thread, no Ray")
        result.ratio["corpus.index_vs_one_process"] = one.seconds / job.seconds
        progress("preparing a run")
        data = config.data.model_copy(update={"train": [str(index)]})
        run = alone(_prepare, inside.model_copy(update={"data": data}))
        result.add("a run's driver prepares it", run.seconds, "s", "to the plan of every step")
        result.add("that driver", run.peak_gb, "GB", "at most, with torch")
        progress(f"planning {planned:,} utterances")
        plan = alone(_plan, run.value, planned, config.optim.bin_positions)
        result.add(f"plan of {planned:,}", plan.seconds, "s", f"{plan.value:.2%} of bins filled")
        result.add("its process", plan.peak_gb, "GB", "at most, with torch")
    return result


@dataclass(frozen=True)
class Measured:
    """Record a call in a process of its own: its value, its seconds, its peak resident memory.

    peak_gb: in units of 10^9 bytes.
    """

    value: Any
    seconds: float
    peak_gb: float


def alone(function: Callable[..., Any], *arguments: Any) -> Measured:
    """Call a module-level function in a fresh process, and measure it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured, function, arguments).result()


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Measured:
    torch.set_num_threads(1)
    began = time.perf_counter()
    value = function(*arguments)
    return Measured(value, time.perf_counter() - began, _peak_bytes() / 1e9)


def _peak_bytes() -> int:
    """Read the peak resident bytes of this process; getrusage would count its parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status: expected a line VmHWM")


def repeat_files(folder: Path, rows: int) -> Path:
    """Write a manifest of `rows` files with distinct ids, which link to the embedded ones."""
    source = manifest_path("embedded:train")
    originals = [json.loads(line) for line in source.read_text().splitlines()]
    folder.mkdir(parents=True)
    for number, row in enumerate(originals):
        (folder / f"{number}.opus").write_bytes((source.parent / row["audio"]).read_bytes())
    manifest = folder / "train.jsonl"
    with manifest.open("w") as file:
        for number in range(rows):
            clip = number % len(originals)
            name = Path(f"{number // 1000:05}", f"{number:08}.opus")
            (folder / name).parent.mkdir(exist_ok=True)
            os.link(folder / f"{clip}.opus", folder / name)
            row = {"id": f"{number:08}", "audio": str(name), "text": originals[clip]["text"]}
            file.write(json.dumps(row) + "\n")
    return manifest


def _index(manifest: Path, out: Path) -> None:
    # The import is here because it loads Ray, which only this measurement needs.
    from omni.corpus.build_tasks import make_index

    make_index([str(manifest)], out, Options(), say=progress)


def _measure(manifest: Path) -> int:
    return len(build_index([str(manifest)], threads=1))


def _prepare(config: Config) -> np.ndarray:
    return prepare(config).lengths


def _plan(lengths: np.ndarray, count: int, bin_positions: int) -> float:
    """Plan an epoch of `count` utterances with lengths drawn from `lengths`.

    Returns the share of the bins' positions that is filled.
    """
    drawn = np.random.default_rng(0).choice(lengths[lengths > 0], count)
    plan = make_plan(
        drawn,
        index_fingerprint="",
        seed=0,
        bin_positions=bin_positions,
        bins_per_step=_BINS_PER_STEP,
        epochs=1,
    )
    return plan.positions(drawn) / (plan.bins * bin_positions)
