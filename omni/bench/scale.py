"""Measure how throughput grows with the number of workers on this machine."""

from __future__ import annotations

import os

import torch

from omni.bench.prepared_run import in_temporary_storage, progress
from omni.bench.timing import Result, describe_machine, median
from omni.bench.whole_run import for_timing, run_job, steps_of_epochs
from omni.config import Config

_ROUNDS = 2


def bench_scale(config: Config) -> Result:
    """Run the `scale` suite on world sizes from 1 to the number of cores."""
    result = Result("scale", describe_machine(torch.device("cpu"), config.train.threads))
    with in_temporary_storage(config) as inside:
        _compare_world_sizes(inside, result)
    return result


def _compare_world_sizes(config: Config, result: Result) -> None:
    """Time the same steps with 1 worker up to one per core, in the epoch that reads the cache.

    A step has one bin for each core.
    """
    cores = os.cpu_count() or 1
    sizes = sorted({1, *(2**n for n in range(1, 7) if 2**n <= cores), cores})
    optim = config.optim.model_copy(update={"bins_per_step": cores, "bins_per_block": 1})
    config = config.model_copy(update={"optim": optim})
    ends = steps_of_epochs(config, 2)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(_ROUNDS):
        for size in sizes:
            progress(f"world size {size}: {ends[1]} steps, two epochs")
            train = config.train.model_copy(update={"workers": size})
            job = run_job(for_timing(config.model_copy(update={"train": train}), ends[1]))
            rates[size].append(job.over(ends[0], ends[1])["rate"])
    for size in sizes:
        rate, one = median(rates[size]), median(rates[1])
        result.add(f"world size {size}", rate, "audio-s/s", "second epoch of the whole job")
        result.ratio[f"scale.efficiency_{size}"] = rate / (size * one)
