"""`encoder.actors: auto`: measure both sides on the cluster for seconds, choose, and say why."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import torch

from omni.data.plan import Split
from omni.data.stages import EncodeStage, StreamSettings
from omni.train.checkpoint import read_state
from omni.train.job import Job, encoder_settings, make_job
from omni.train.metrics import append_json
from omni.train.prepare import Prepared
from omni.train.rates import Trainer, encoder_rate, first_rows, loaded_blocks, without_cache
from omni.train.sizing import choose_actors

_MEASURED_BINS, _MEASURE_SECONDS = 8, 2.0


def sized(prepared: Prepared) -> Prepared:
    """With `encoder.actors: auto`, a number of actors, and a note that says why."""
    config = prepared.config
    if config.encoder.actors != "auto":
        return prepared
    encoder, workers = config.encoder, config.train
    on_gpu = encoder.gpus > 0
    total = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0.0)
    if on_gpu:
        spare, each, unit = total - workers.most * workers.gpus, encoder.gpus, "GPUs"
    else:
        cores = float(os.cpu_count() or 1) if len(ray.nodes()) == 1 else total
        spare, each, unit = cores - workers.most * workers.threads, encoder.threads, "cores"
    missing = _missing(prepared)
    encoder_rate = trainer_rate = 1.0
    if missing:
        split = ray.put(prepared.splits["train"])
        settings = without_cache(encoder_settings(config, prepared.encoder))
        measure: Any = ray.remote(num_cpus=encoder.cpus, num_gpus=encoder.gpus)(_measure_encoder)
        encoder_rate, blocks = ray.get(measure.remote([split], settings))
        job = make_job(prepared)
        measure = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(_measure_trainer)
        trainer_rate = ray.get(measure.remote(job, blocks))
    sizing = choose_actors(
        encoder_rate=encoder_rate,
        trainer_rate=trainer_rate,
        workers=workers.most,
        missing=missing,
        spare=spare,
        each=each,
        unit=unit,
    )
    row = {"kind": "note", "step": _step(prepared), "text": f"encoder.actors auto: {sizing.reason}"}
    append_json(config.run_dir / "metrics.jsonl", [row])
    gpus = sizing.gpus if on_gpu else 0
    encoder = encoder.model_copy(update={"actors": sizing.actors, "gpus": gpus})
    return replace(prepared, config=config.model_copy(update={"encoder": encoder}))


def _missing(prepared: Prepared) -> float:
    """Share of the training utterances that the cache lacks."""
    keys = prepared.splits["train"].table["key"].to_pylist()
    cache = encoder_settings(prepared.config, prepared.encoder).open_cache()
    return 1.0 if cache is None else sum(key not in cache for key in keys) / len(keys)


def _measure_encoder(
    splits: list[ray.ObjectRef], settings: StreamSettings
) -> tuple[float, list[pa.Table]]:
    """Audio seconds per second of one encoder actor, and encoded blocks."""
    torch.set_num_threads(settings.config.encoder.threads)
    split: Split = ray.get(splits[0])
    optim = settings.config.optim
    bins = first_rows(split.plan, max(_MEASURED_BINS, 2 * optim.bins_per_step), optim)
    loaded, _ = loaded_blocks(split, bins, settings)
    return encoder_rate(EncodeStage(settings), loaded, _MEASURE_SECONDS)


def _measure_trainer(job: Job, blocks: list[pa.Table]) -> float:
    """Audio seconds per second of one worker that never waits."""
    torch.set_num_threads(job.config.train.threads)
    device = torch.device("cuda" if job.config.train.gpus else "cpu")
    return Trainer(job, blocks, device).rate(_MEASURE_SECONDS)


def _step(prepared: Prepared) -> int:
    """Where the run stands: a note about a later step would be taken back on resume."""
    return 0 if prepared.resume is None else read_state(prepared.resume).state.step
