"""`encoder.actors: auto`: choose from what a trial measured on the cluster, and say why."""

from __future__ import annotations

import os
from dataclasses import replace

import ray

from omni.errors import ConfigError
from omni.metrics.run_files import append_json
from omni.run.estimate import audio_per_step, step_seconds
from omni.run.prepare import Prepared
from omni.run.sizing import choose_actors
from omni.run.trial import Trial


def sized(prepared: Prepared, trial: Trial, missing: float) -> Prepared:
    """With a number of actors for `encoder.actors: auto`, and a note that says why.

    missing: share of the training audio that the cache lacks. Raises ConfigError.
    """
    config = prepared.config
    if trial.block is None:
        raise ConfigError(
            "encoder.actors: auto measures a worker alone, and one shard of this model has no "
            "room for it; expected a number"
        )
    encoder, workers = config.encoder, config.train
    on_gpu = encoder.gpus > 0
    total = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0.0)
    if on_gpu:
        spare, each, unit = total - workers.most * workers.gpus, encoder.gpus, "GPUs"
    else:
        cores = float(os.cpu_count() or 1) if len(ray.nodes()) == 1 else total
        spare, each, unit = cores - workers.most * workers.threads, encoder.threads, "cores"
    split = prepared.splits["train"]
    audio = audio_per_step(split.plan, split.table["samples"].to_numpy()) / workers.most
    sizing = choose_actors(
        encoder_rate=trial.encoder_rate,
        trainer_rate=audio / step_seconds(config, trial.block, workers.most),
        workers=workers.most,
        missing=missing,
        spare=spare,
        each=each,
        unit=unit,
        lasting=config.cache is None or config.augment.clean_share < 1,
    )
    row = {"kind": "note", "step": _step(prepared), "text": f"encoder.actors auto: {sizing.reason}"}
    append_json(config.run_dir / "metrics.jsonl", [row])
    gpus = sizing.gpus if on_gpu else 0
    encoder = encoder.model_copy(update={"actors": sizing.actors, "gpus": gpus})
    return replace(prepared, config=config.model_copy(update={"encoder": encoder}))


def _step(prepared: Prepared) -> int:
    """Where the run stands: a note about a later step would be taken back on resume."""
    return 0 if prepared.resume is None else prepared.resume.state.step
