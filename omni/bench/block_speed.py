"""Measure what handing out blocks costs, by their length, and how long a long run takes to begin.

All features are cached, and nobody trains.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray
from ray.data import ExecutionOptions

from omni.bench.timing import Result, median
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.plan.stream_order import PlannedBin
from omni.run.prepare import prepare
from omni.stream.pipeline import SharedSettings, make_stream
from omni.stream.stream_settings import stream_settings

_RANKS = 2
_LONG = 16
"""Steps of a long block: half a second of steps of 30 ms."""
_WARM, _MEASURED = 128, 512  # steps
_SHORT_RUN, _LONG_RUN = 512, 1_200_000  # steps left
_ROUNDS = 3


@dataclass(frozen=True)
class RepeatedSteps:
    """Steps of one bin for each rank, which go through the bins of a split again and again."""

    steps: int
    steps_per_block: int
    bins: int

    @property
    def blocks(self) -> int:
        return self.steps // self.steps_per_block * _RANKS

    def block(self, number: int) -> list[PlannedBin]:
        turn, rank = divmod(number, _RANKS)
        first = turn * self.steps_per_block
        steps = range(first, first + self.steps_per_block)
        return [PlannedBin(0, (step * _RANKS + rank) % self.bins) for step in steps]


@dataclass(frozen=True)
class _Read:
    first: float
    """Seconds from making the stream to its first block."""
    cpu: float
    """Seconds of CPU of the stream's coordinator for a step."""
    wall: float
    """Seconds between two steps."""


def add_block_costs(config: Config, result: Result) -> None:
    """Read streams of blocks of one step and of several, by turns. The cache holds all features."""
    prepared = prepare(config)
    split = prepared.splits["train"]
    settings = replace(
        stream_settings(prepared.config, prepared.encoder), encode=False, bins_per_block=1
    )
    start_ray(config)
    try:
        shared, splits = SharedSettings.put(settings), [ray.put(split)]
        found: dict[tuple[int, int], list[_Read]] = {}
        _read(splits, RepeatedSteps(_SHORT_RUN, 1, split.plan.bins), shared, 1)  # starts processes
        for _ in range(_ROUNDS):
            for left, length in ((_SHORT_RUN, 1), (_LONG_RUN, 1), (_LONG_RUN, _LONG)):
                steps = _WARM if left == _SHORT_RUN else _WARM + _MEASURED
                order = RepeatedSteps(left, length, split.plan.bins)
                found.setdefault((left, length), []).append(_read(splits, order, shared, steps))
    finally:
        ray.shutdown()
    begun = {key: median([read.first for read in reads]) for key, reads in found.items()}
    for left in (_SHORT_RUN, _LONG_RUN):
        result.add(f"first block, {left:,} steps left", begun[left, 1], "s", "cached features")
        result.add_point("First block, by steps left", "s", "", left, begun[left, 1])
    for length in (1, _LONG):
        reads = found[_LONG_RUN, length]
        cpu, wall = (median([getattr(read, name) for read in reads]) for name in ("cpu", "wall"))
        name = f"blocks of {length} step{'s' * (length > 1)}"
        result.add(f"{name}, coordinator", cpu * 1e3, "ms of CPU per step", f"{_RANKS} ranks")
        result.add(f"{name}, a step", wall * 1e3, "ms", "nobody trains")
    one, many = (median([r.cpu for r in found[_LONG_RUN, length]]) for length in (1, _LONG))
    result.ratio["stream.coordinator_cpu"] = one / many


def _read(splits: Any, order: RepeatedSteps, settings: SharedSettings, steps: int) -> _Read:
    """Read so many steps on all ranks at the same time."""
    began = time.perf_counter()
    stream = make_stream(splits, order, settings)
    stream.context.execution_options = ExecutionOptions(preserve_order=True)
    shards: list[Any] = stream.streaming_split(_RANKS, equal=True)
    pid = ray.get(shards[0]._coord_actor.__ray_call__.remote(_pid))
    coordinator, marks = psutil.Process(pid), [(0.0, 0.0)] * 3

    def mark(number: int) -> None:
        spent = coordinator.cpu_times()
        marks[number] = (time.perf_counter(), spent.user + spent.system)

    def read(rank: int) -> None:
        blocks = iter(shards[rank].iter_batches(batch_size=1, batch_format="pyarrow"))
        for step in range(1, steps + 1):
            next(blocks)
            if rank == 0 and step in (1, _WARM, steps):
                mark((1, _WARM, steps).index(step))

    with ThreadPoolExecutor(_RANKS) as pool:
        list(pool.map(read, range(_RANKS)))
    measured = max(1, steps - _WARM)
    wall, cpu = ((marks[2][n] - marks[1][n]) / measured for n in (0, 1))
    ray.kill(shards[0]._coord_actor)
    return _Read(marks[0][0] - began, cpu, wall)


def _pid(actor: object) -> int:
    return os.getpid()
