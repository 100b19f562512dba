"""Measure how the time and the driver's memory grow with a corpus of several windows."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni.bench.prepared_run import progress
from omni.bench.process_alone import Measured, alone
from omni.bench.timing import Result
from omni.config import Config
from omni.corpus.index import INDEX_VERSION, build_index
from omni.corpus.manifest import INDEX_FILE
from omni.corpus.parts import PART_ROWS
from omni.plan.windows import PartLengths, Parts, Windows
from omni.run.prepare import prepare
from omni.run.rates import loaded_blocks, without_cache
from omni.stream.stream_settings import stream_settings

# Windows of a billion utterances that are planned, of 3,815.
_PLANNED_WINDOWS = 5


def add_windows(
    config: Config, folder: Path, sizes: list[int], planned: int, result: Result
) -> None:
    """Prepare indexes of so many rows, twice each, and plan `planned` utterances by window."""
    for rows in sizes:
        progress(f"writing an index of {rows:,} rows")
        index = write_index(folder / f"index-{rows}", rows)
        data = config.data.model_copy(
            update={"train": [str(index)], "cache": str(folder / "cache")}
        )
        run = config.model_copy(update={"data": data})
        progress("preparing it, twice")
        first = alone(_start, run)
        again: Measured = alone(_start, run)
        name = f"{rows:,} rows"
        cores = len(os.sched_getaffinity(0))
        rate = rows / first.value.prepared / cores
        result.add(name, first.value.prepared, "s", f"prepared: {rate:,.0f} rows/s per core")
        result.add(f"{name}, again", again.value.prepared, "s", "from the totals of the parts")
        result.add(f"{name}, first block", again.seconds, "s", "with imports, decoded, without Ray")
        result.add(f"{name}, driver", again.peak_gb, "GB", "at most, with torch")
        seconds, memory = "First block, by utterances", "Peak memory of the driver, by utterances"
        result.add_point(seconds, "s", "first time", rows, first.seconds)
        result.add_point(seconds, "s", "again", rows, again.seconds)
        result.add_point(memory, "GB", "first time", rows, first.peak_gb)
        result.add_point(memory, "GB", "again", rows, again.peak_gb)
    progress(f"planning {_PLANNED_WINDOWS} windows of {planned:,} utterances")
    plan = alone(_plan, planned, config.optim.bin_positions, config.data.window_utterances)
    result.add(f"{planned:,} utterances", plan.value.first, "s", "to the plan of the first window")
    result.add("each window after it", plan.value.each, "s", f"{plan.value.filled:.3%} filled")
    result.add("its process", plan.peak_gb, "GB", "at most, with torch")


def write_index(folder: Path, rows: int) -> Path:
    """Write an index of synthetic rows: ids of their own, the clips of the embedded corpus."""
    clips = build_index(["embedded:train"]).table
    (folder / "parts").mkdir(parents=True)
    names = []
    for first in range(0, rows, PART_ROWS):
        numbers = np.arange(first, min(rows, first + PART_ROWS))
        table = clips.take(pa.array(numbers % len(clips)))
        ids = pa.array([f"row-{number:010}" for number in numbers], pa.large_string())
        table = table.set_column(table.schema.get_field_index("id"), table.schema.field("id"), ids)
        names.append(f"part-{first // PART_ROWS:06}")
        pq.write_table(table, folder / "parts" / f"{names[-1]}.parquet", compression="zstd")
    (folder / "rejects.jsonl").write_text("")
    about = {"version": INDEX_VERSION, "utterances": rows, "parts": names}
    (folder / INDEX_FILE).write_text(json.dumps(about))
    return folder


@dataclass(frozen=True)
class _Started:
    prepared: float
    """Seconds of `prepare`."""


def _start(config: Config) -> _Started:
    """Prepare a run, and load the first block of its plan."""
    began = time.perf_counter()
    prepared = prepare(config, progress)
    seconds = time.perf_counter() - began
    settings = without_cache(stream_settings(prepared.config, prepared.encoder))
    loaded_blocks(prepared.splits["train"], range(config.optim.bins_per_block), settings)
    return _Started(seconds)


@dataclass(frozen=True)
class _Planned:
    first: float
    """Seconds from nothing to the plan of the first window."""
    each: float
    """Seconds of each window after it."""
    filled: float
    """Share of the positions that hold an utterance."""


def _plan(utterances: int, bin_positions: int, window: int) -> _Planned:
    """Plan the first windows of a corpus whose lengths are drawn part by part."""
    began = time.perf_counter()

    def read(part: int) -> PartLengths:
        shares = np.random.default_rng(part).beta(2, 8, PART_ROWS)
        return PartLengths(np.maximum(1, (shares * bin_positions / 4).astype(np.int64)))

    count = -(-utterances // PART_ROWS)
    every = np.full(count, PART_ROWS)
    parts = Parts(every, every, np.zeros(count, np.int64), every, (1.0,), ("",) * count)
    windows = Windows(parts, read, seed=0, bin_positions=bin_positions, window_utterances=window)
    made = [windows.plan(0)]
    first = time.perf_counter() - began
    made += [windows.plan(number) for number in range(1, _PLANNED_WINDOWS)]
    each = (time.perf_counter() - began - first) / (_PLANNED_WINDOWS - 1)
    bins = sum(window.bins for window in made)
    filled = sum(window.positions for window in made) / (bins * bin_positions)
    return _Planned(first, each, filled)
