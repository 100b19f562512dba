"""Choose the number of encoder actors from measured rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omni.config import Config

HEADROOM = 1.1
"""Encoders are sized to be this much faster than the trainers they feed."""


@dataclass(frozen=True)
class ActorChoice:
    actors: int
    gpus: float
    """Share of a GPU for each actor."""
    reason: str


def is_auto(config: Config) -> bool:
    return config.encoder.actors == "auto"


def assume_actors(config: Config, count: int) -> Config:
    """Replace `encoder.actors: auto` by `count` where nothing has been measured yet."""
    return with_encoder(config, actors=count) if is_auto(config) else config


def choose_actors(
    *,
    encoder_rate: float,
    trainer_rate: float,
    workers: int,
    missing: float,
    spare: float,
    each: float,
    unit: str,
    lasting: bool = False,
) -> ActorChoice:
    """Choose the number of encoder actors that keeps `workers` trainers busy.

    encoder_rate, trainer_rate: audio seconds per second of one actor, of one worker.
    missing: share of the audio that the cache lacks.
    spare: resources that the trainers leave free, in `unit` (GPUs or CPU cores).
    each: resources that one actor asks for; if less is free, one actor takes all of it.
    lasting: the cache never fills, so every epoch encodes again.
    """
    fit = max(1, math.floor(spare / each + 1e-9)) if each else 1
    share = min(each, spare) if 0 < spare < each else each
    demand = workers * trainer_rate
    if missing <= 0:
        return ActorChoice(
            1, share, "1 encoder actor, which is not started: the cache holds every feature"
        )
    needed = max(1, math.ceil(HEADROOM * demand / encoder_rate))
    actors = min(needed, fit)
    reason = (
        f"{actors} encoder actor{'s' * (actors > 1)}: {workers} worker{'s' * (workers > 1)} train "
        f"{demand:,.0f} audio-s/s, an actor encodes {encoder_rate:,.0f}"
    )
    if needed > fit:
        reason += (
            f"; {needed} would be needed, {fit} fit into the {spare:g} {unit} to spare: "
            f"{'' if lasting else 'while the cache fills, '}trainers wait "
            f"{1 - actors * encoder_rate / demand:.0%} of the time"
        )
    return ActorChoice(actors, share, reason)


def with_encoder(config: Config, **changes: object) -> Config:
    encoder = config.encoder.model_copy(update=changes)
    return config.model_copy(update={"encoder": encoder})
