"""Estimate the training time of a run and the stage that will limit it, from its first block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omni.audio.windows import SAMPLING_RATE
from omni.config import Config
from omni.plan.plan import Plan, padded_step
from omni.run.rates import Cost


@dataclass(frozen=True)
class Estimate:
    """Seconds of training steps without evaluations, and the limiting stage (a key of ADVICE)."""

    seconds: float
    limit: str
    filling: float  # seconds until the cache holds all features
    filling_limit: str
    busy: float  # seconds of a step that does not wait
    pace: float  # seconds of each of the first steps

    def __str__(self) -> str:
        text = f"about {duration(self.seconds)} of training steps, {self.limit}-bound"
        if self.filling_limit != self.limit:
            filling = duration(self.filling)
            text += f"; {self.filling_limit}-bound for the first {filling}, until all is encoded"
        return text


def audio_per_step(plan: Plan, samples: np.ndarray) -> float:
    """Return the mean seconds of audio in a step. samples: (n,) of each utterance.

    plan: the whole one, or that of the first window, which stands for all.
    """
    return float(samples[plan.members].sum()) / SAMPLING_RATE / plan.steps


def step_seconds(config: Config, block: Cost, workers: int) -> float:
    """Return the seconds of a step that does not wait for blocks."""
    optim = config.optim
    rows = padded_step(optim.bins_per_step, workers, optim.bins_per_block)
    return rows // (workers * optim.bins_per_block) * block.seconds + block.update_seconds


def estimate(
    config: Config,
    plan: Plan,
    samples: np.ndarray,
    *,
    workers: int,
    encoders: int,
    decode_rate: float,
    encoder_rate: float,
    block: Cost,
    missing: float,
    cores: float | None,
) -> Estimate:
    """Estimate all steps of the plan.

    samples: (n,) of each utterance. missing: share of the audio that the cache lacks. Rates are
    audio seconds per second of one task or actor. cores: CPU cores that all stages share on a
    single machine without GPUs; None if each stage has its own.
    """
    steps, audio = config.optim.steps, audio_per_step(plan, samples)
    train = step_seconds(config, block, workers)
    always = 1.0 if config.cache is None else 1 - config.augment.clean_share
    share = always or 1.0
    # Seconds of a step whose audio has to be encoded, and the number of cores that work on it.
    pools = {
        "trainer": (train, workers * config.train.threads),
        "encoder": (share * audio / (encoder_rate * encoders), encoders * config.encoder.threads),
        "decode": (share * audio / (decode_rate * config.data.loaders), config.data.loaders),
    }
    limit = max(pools, key=lambda name: pools[name][0])
    step = pools[limit][0]
    if cores:
        step = max(step, sum(seconds * processes for seconds, processes in pools.values()) / cores)
        train = max(train, train * pools["trainer"][1] / cores)
    if always:  # Every epoch encodes.
        return Estimate(step * steps, limit, step * steps, limit, train, step)
    epoch = int(plan.epoch_ends[0]) / config.optim.bins_per_step if len(plan.epoch_ends) else steps
    filling = missing * min(epoch, steps)
    rest = (steps - filling) * train
    whole = "trainer" if rest > filling * step else limit
    return Estimate(
        filling * step + rest,
        whole,
        filling * step,
        limit if filling else whole,
        train,
        step if filling else train,
    )


def duration(seconds: float) -> str:
    """Format seconds as 12 s, 4 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
