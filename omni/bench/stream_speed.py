"""Compare the whole job with its stages alone, and measure the cost of the cache and of Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from omni.bench.block_speed import add_block_costs
from omni.bench.prepared_run import Sample, in_temporary_storage, progress, take_sample
from omni.bench.timing import Result, describe_machine, median
from omni.bench.whole_run import JobRun, for_timing, run_job, steps_of_epochs
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.plan.plan import Split
from omni.plan.stream_order import ListedBins
from omni.run.prepare import make_worker_spec, prepare
from omni.run.rates import Trainer, audio_seconds
from omni.stream.pipeline import SharedSettings, make_stream
from omni.stream.schema import LOADED_SCHEMA
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import StreamSettings, stream_settings

_BINS = 16
_ROUNDS = 2
# The first steps are left out, because the stream is still starting.
_WARM_STEPS = 3


def bench_stream(config: Config) -> Result:
    """Run the `stream` suite: alternate each stage alone with the whole job.

    It ends with the stream without a trainer, for an epoch that encodes and one that reads the
    cache.
    """
    result = Result("stream", describe_machine(torch.device("cpu"), config.train.threads))
    with in_temporary_storage(config) as inside:
        ends = steps_of_epochs(inside, 2)
        timed = for_timing(inside, ends[1])
        rounds = []
        for turn in range(_ROUNDS):
            progress(f"round {turn + 1} of {_ROUNDS}: encoder alone, trainer alone")
            alone = _stage_rates(timed)
            progress(f"round {turn + 1} of {_ROUNDS}: the whole job, {ends[1]} steps, two epochs")
            rounds.append(_compare_with_bounds(alone, run_job(timed), ends, timed))
        _report(rounds, result)
        sample = take_sample(timed, _BINS, seconds=0)
        _add_traffic(sample, result)
        progress("the stream without a trainer, two epochs")
        _measure_stream(timed, ends, result)
        progress("blocks of one step and of several, and the start of a long run")
        add_block_costs(timed, result)
    return result


def _stage_rates(config: Config) -> dict[str, float]:
    """Measure the audio seconds per second of each stage alone in this process."""
    sample = take_sample(config, _BINS)
    torch.set_num_threads(config.train.threads)
    trainer = Trainer(make_worker_spec(sample.prepared), sample.encoded, torch.device("cpu"))
    return {
        "loader": sample.load_rate,
        "encoder": sample.encode_rate * config.encoder.actor_count,
        "trainer": trainer.rate(5.0) * config.train.most,
    }


def _compare_with_bounds(
    alone: dict[str, float], job: JobRun, ends: Sequence[int], config: Config
) -> dict[str, float]:
    """Compare the rates of a job's epochs with the slower of encoder and trainer alone."""
    first, second = job.over(_WARM_STEPS, ends[0]), job.over(ends[0], ends[1])
    bound = (min(alone["encoder"], alone["trainer"]), alone["trainer"])
    # This is the CPU time of all processes for a second of audio, if none slows down another.
    work = (
        1 / alone["loader"]
        + config.encoder.actor_count * config.encoder.threads / alone["encoder"]
        + config.train.most * config.train.threads / alone["trainer"]
    )
    cores = (os.cpu_count() or 1) / work
    ideal = first["audio_seconds"] / bound[0] + second["audio_seconds"] / bound[1]
    return {
        **alone,
        "epoch 1": first["rate"],
        "epoch 2": second["rate"],
        "trainer waits, epoch 1": first["waited"],
        "trainer waits, epoch 2": second["waited"],
        "encoder busy": first["encode_seconds"] / first["seconds"] / config.encoder.actor_count,
        "share": ideal / (first["seconds"] + second["seconds"]),
        "cores": cores,
        "share of cores": first["rate"] / min(cores, bound[0]),
        "share, epoch 1": first["rate"] / bound[0],
        "share, epoch 2": second["rate"] / bound[1],
    }


def _report(rounds: list[dict[str, float]], result: Result) -> None:
    middle = {name: median([r[name] for r in rounds]) for name in rounds[0]}
    for name in ("loader", "encoder", "trainer"):
        result.add(f"{name} alone", middle[name], "audio-s/s")
    result.add("all three on these cores", middle["cores"], "audio-s/s", "without Ray")
    for epoch, what in ((1, "encodes and caches"), (2, "reads the cache")):
        result.add(f"whole job, epoch {epoch}", middle[f"epoch {epoch}"], "audio-s/s", what)
        result.add("  its trainers wait", middle[f"trainer waits, epoch {epoch}"], "of the time")
        result.ratio[f"stream.share_of_bound_epoch{epoch}"] = middle[f"share, epoch {epoch}"]
    result.add("  encoders busy in epoch 1", middle["encoder busy"], "of the time")
    result.ratio["stream.share_of_bound"] = middle["share"]
    result.ratio["stream.share_of_cores_epoch1"] = middle["share of cores"]


def _add_traffic(sample: Sample, result: Result) -> None:
    """Add the bytes per second of audio that pass through the object store between stages."""
    audio = sum(map(audio_seconds, sample.encoded))
    loaded, encoded = (sum(t.nbytes for t in ts) for ts in (sample.loaded, sample.encoded))
    result.add("object store, load to encode", loaded / audio / 1e3, "kB/audio-s", "epoch 1")
    result.add("object store, encode to train", encoded / audio / 1e3, "kB/audio-s", "each epoch")


def _measure_stream(config: Config, ends: Sequence[int], result: Result) -> None:
    """Measure the stream without a trainer: the gain of the cache, and the overhead of Ray."""
    prepared = prepare(config)
    train = prepared.splits["train"]
    settings = stream_settings(config, prepared.encoder)
    bins = [end * config.optim.bins_per_step for end in ends]
    start_ray(config)
    try:
        reference = [ray.put(train)]
        taken: list[dict[str, float]] = ray.get(_drain.remote(reference, settings, bins[1]))
    finally:
        ray.shutdown()
    first = _rate(taken[_WARM_STEPS : bins[0]])
    second = _rate(taken[bins[0] : bins[1]])
    result.add("stream alone, epoch 1", first[0], "audio-s/s", "encodes and caches")
    result.add("stream alone, epoch 2", second[0], "audio-s/s", "reads the cache")
    result.ratio["stream.epoch2_vs_epoch1"] = second[0] / first[0]
    bare = _without_ray(train, settings, range(bins[0], bins[1]))
    result.add("Ray", (second[1] - bare) * 1e3, "ms/utterance", "second epoch, wall time")
    result.add("the same without Ray", bare * 1e3, "ms/utterance", "one process")


@ray.remote(num_cpus=1)
def _drain(splits: list[ray.ObjectRef[Any]], settings: StreamSettings, bins: int) -> list[Any]:
    """Read the stream to its end, and note time, audio seconds and utterances of each block."""
    torch.set_num_threads(1)
    order = ListedBins(np.arange(bins), settings.bins_per_block)
    stream = make_stream(splits, order, SharedSettings.put(settings))
    stream.context.execution_options.preserve_order = True
    taken = []
    for block in stream.iter_batches(batch_size=settings.bins_per_block, batch_format="pyarrow"):
        audio = audio_seconds(block)
        count = sum(len(ids) for ids in pa.table(block)["ids"].to_pylist())
        taken.append({"at": time.perf_counter(), "audio": audio, "utterances": count})
    return taken


def _rate(taken: list[dict[str, float]]) -> tuple[float, float]:
    """Compute audio seconds per second, and seconds per utterance."""
    seconds = taken[-1]["at"] - taken[0]["at"]
    audio, utterances = (sum(t[name] for t in taken[1:]) for name in ("audio", "utterances"))
    return audio / seconds, seconds / utterances


def _without_ray(split: Split, settings: StreamSettings, bins: range) -> float:
    """Measure the seconds per utterance of the stages on cached bins, in this process."""
    cache = settings.open_cache()
    stage = EncodeStage(settings)
    began = time.perf_counter()
    utterances = 0
    for number in bins:
        row = load_bin(split, number, settings, cache)
        utterances += len(row["ids"])
        stage(pa.Table.from_pylist([row], LOADED_SCHEMA))
    return (time.perf_counter() - began) / utterances
