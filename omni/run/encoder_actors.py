"""Resolve `encoder.actors: auto` to a number, from rates that a trial measured on the cluster."""

from __future__ import annotations

import os
from dataclasses import replace

from omni.cluster.capacity import cluster_nodes, selectors
from omni.errors import ConfigError
from omni.metrics.run_files import append_json
from omni.run.actor_count import choose_actors, with_encoder
from omni.run.estimate import audio_per_step, step_seconds
from omni.run.prepare import Prepared
from omni.run.trial import Trial


def resolve_encoder_actors(prepared: Prepared, trial: Trial, missing: float) -> Prepared:
    """Replace `encoder.actors: auto` by a number, and log the reason as a note.

    missing: share of the training audio that the cache lacks. Raises ConfigError.
    """
    config = prepared.config
    if trial.block is None:
        raise ConfigError(
            "encoder.actors: auto measures a single worker, and a shard of this model does not fit "
            "into one; expected a number"
        )
    encoder, workers = config.encoder, config.train
    on_gpu = encoder.gpus > 0
    _, _, loaders = selectors(config)
    nodes = [node for node in cluster_nodes() if node.has(loaders)]
    total = sum(node.resources.get("GPU" if on_gpu else "CPU", 0.0) for node in nodes)
    if on_gpu:
        spare, each, unit = total - workers.most * workers.gpus, encoder.gpus, "GPUs"
    else:
        cores = float(os.cpu_count() or 1) if len(nodes) == 1 else total
        spare, each, unit = cores - workers.most * workers.threads, encoder.threads, "cores"
    split = prepared.splits["train"]
    audio = audio_per_step(split.beginning, split.table["samples"].to_numpy()) / workers.most
    choice = choose_actors(
        encoder_rate=trial.encoder_rate,
        trainer_rate=audio / step_seconds(config, trial.block, workers.most),
        workers=workers.most,
        missing=missing,
        spare=spare,
        each=each,
        unit=unit,
        lasting=config.cache is None or config.augment.clean_share < 1,
    )
    # A note about a later step would be dropped on resume.
    step = 0 if prepared.resume is None else prepared.resume.state.step
    text = f"encoder.actors auto: {choice.reason}"
    append_json(config.run_dir / "metrics.jsonl", [{"kind": "note", "step": step, "text": text}])
    gpus = choice.gpus if on_gpu else 0
    return replace(prepared, config=with_encoder(config, actors=choice.actors, gpus=gpus))
