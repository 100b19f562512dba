"""More of everything: world sizes on this machine, and simulated ones up to thousands."""

from __future__ import annotations

import os
import time

import torch

from omni.bench.prepared_run import in_temporary_storage, progress, take_sample
from omni.bench.timing import Result, describe_machine, median
from omni.bench.whole_run import for_timing, run_job, steps_of_epochs
from omni.config import Config
from omni.run.make_job import make_job
from omni.run.rates import Trainer, audio_seconds
from omni.run.sizing import Played, best_split, simulate
from omni.stream.stages import EncodeStage

_BINS = 24
_ROUNDS = 2
_DEVICES = (2, 4, 8, 16, 64, 256, 1024, 4096)


def bench_scale(config: Config) -> Result:
    """`scale` suite. One device of the simulation has the rates of one process of this machine."""
    result = Result("scale", describe_machine(torch.device("cpu"), config.train.threads))
    with in_temporary_storage(config) as inside:
        _worlds(inside, result)
        _simulated(inside, result)
    return result


def _worlds(config: Config, result: Result) -> None:
    """The same steps, of one bin for each core, by 1 to all cores; second epoch, from the cache."""
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


def _simulated(config: Config, result: Result) -> None:
    """Splits of N devices between encoders and trainers, from block times measured here."""
    progress("stage rates for the simulation")
    sample = take_sample(config, _BINS, seconds=0)
    stage = EncodeStage(sample.settings)
    encode = []
    for block in sample.loaded:
        began = time.perf_counter()
        stage(block)
        encode.append(time.perf_counter() - began)
    torch.set_num_threads(config.train.threads)
    trainer = Trainer(make_job(sample.prepared), sample.encoded, torch.device("cpu"))
    train = []
    for number in range(_BINS + 2):
        began = time.perf_counter()
        trainer.step()
        if number >= 2:
            train.append(time.perf_counter() - began)
    train = [seconds / trainer.blocks_per_step for seconds in train]
    audio = sum(map(audio_seconds, sample.encoded)) / len(sample.encoded)
    result.add("a block: encode", 1e3 * median(encode), "ms", f"{audio:.0f} s of audio")
    result.add("a block: train", 1e3 * median(train), "ms")
    for devices in _DEVICES:
        progress(f"simulating {devices} devices")
        encoders, trainers, played = best_split(
            devices, encode_seconds=encode, train_seconds=train, audio_seconds=audio
        )
        cached = simulate(
            0, devices, encode_seconds=encode, train_seconds=train, audio_seconds=audio
        )
        result.add(
            f"{devices} devices",
            played.rate,
            "audio-s/s",
            f"best: {encoders} encode, {trainers} train; {_waits(played)}; "
            f"{cached.rate:,.0f} once cached",
        )
    few = simulate(1, 8, encode_seconds=encode, train_seconds=train, audio_seconds=audio)
    result.notes.append(f"1 encoder for 8 trainers would starve the {few.starving}: {_waits(few)}")


def _waits(played: Played) -> str:
    return f"trainers wait {played.trainers_wait:.0%}, encoders {played.encoders_wait:.0%}"
