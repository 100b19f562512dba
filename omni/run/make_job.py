"""What every rank of a run, and every stage of its stream, is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from omni.config import Config
from omni.model.speech_lm import OmniConfig
from omni.plan.plan import EMPTY, Split
from omni.run.prepare import Prepared, encoder_key
from omni.storage.path import join
from omni.stream.codec import DTYPES, FeatureCodec
from omni.stream.stages import StreamSettings


@dataclass(frozen=True)
class Job:
    config: Config
    model: OmniConfig
    encoder: dict[str, Any]  # source, mode, margin_seconds, dtype, fingerprint, d_model, ...
    tokenizer_json: str
    template: Literal["plain", "chat"]
    tasks: list[str]
    fingerprints: dict[str, str]
    held_rows: dict[str, int]  # rows of dev and test that lead the stream
    train_rows: int  # utterances of the training index
    epoch_ends: list[int]  # bins up to the end of each epoch


def make_job(prepared: Prepared, workers: int = 1) -> Job:
    """The job of one attempt, with so many workers."""
    train = prepared.splits["train"]
    return Job(
        config=prepared.config,
        model=prepared.model,
        encoder=prepared.encoder,
        tokenizer_json=prepared.tokenizer.to_json(),
        template=prepared.template,
        tasks=prepared.tasks,
        fingerprints=prepared.fingerprints,
        held_rows={
            name: len(held_bins(split, prepared.config, workers))
            for name, split in prepared.splits.items()
            if name != "train"
        },
        train_rows=train.table.num_rows,
        epoch_ends=train.plan.epoch_ends.tolist(),
    )


def encoder_settings(config: Config, facts: dict[str, Any]) -> StreamSettings:
    """What the stages of the stream need to know of the encoder that `facts` describe."""
    encoder = config.encoder
    return StreamSettings(
        config=config,
        n_mels=facts["n_mels"],
        codec=FeatureCodec.of(facts),
        cache=None if config.cache is None else join(config.cache, encoder_key(facts)),
        encoder={
            "source": None if encoder.weights == "hub" else encoder.weights,
            "mode": encoder.mode,
            "margin_seconds": encoder.margin_seconds,
            "layers": encoder.layers,
            "dtype": DTYPES[encoder.dtype],
            "frame_budget": encoder.frame_budget,
        },
        bins_per_block=config.optim.bins_per_block,
        fingerprint=facts["fingerprint"],
    )


def held_bins(split: Split, config: Config, workers: int) -> np.ndarray:
    """A held-out split's bins, filled up so that all ranks take equally many blocks."""
    unit = workers * config.optim.bins_per_block
    bins = np.full(-(-split.plan.bins // unit) * unit, EMPTY, dtype=np.int64)
    bins[: split.plan.bins] = np.arange(split.plan.bins)
    return bins
