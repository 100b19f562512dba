"""Measure the time and the driver's memory to index and to plan large corpora."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from omni.bench.prepared_run import in_temporary_storage, progress
from omni.bench.process_alone import alone
from omni.bench.timing import Result, describe_machine
from omni.bench.window_speed import add_windows
from omni.config import Config
from omni.corpus.index import build_index
from omni.corpus.manifest import manifest_path
from omni.corpus.sources import Options
from omni.run.prepare import prepare

_ROWS = 100_000
_PLANNED = 1_000_000_000
_SIZES = (300_000, 1_000_000)


def bench_corpus(
    config: Config,
    rows: int = _ROWS,
    planned: int = _PLANNED,
    sizes: Sequence[int] = _SIZES,
) -> Result:
    """Run the `corpus` suite: index `rows` files with jobs.index, prepare, and plan.

    planned: utterances of a corpus that is planned window by window. sizes: rows of indexes that
    are prepared.

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
        add_windows(inside, folder, list(sizes), planned, result)
    return result


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


def _prepare(config: Config) -> int:
    return prepare(config).splits["train"].plan.bins
