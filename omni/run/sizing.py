"""How many encoders a run needs: a decision from measured rates, and a simulation to check it.

Without Ray. `encoder.actors: auto` decides by `choose_actors`; `jobs.bench scale` lets `simulate`
play runs of any size from the rates of this machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HEADROOM = 1.1  # encoders are to be a little faster than what they feed


@dataclass(frozen=True)
class Sizing:
    """A number of encoder actors, the GPU share of each, and why."""

    actors: int
    gpus: float
    reason: str


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
) -> Sizing:
    """Encoder actors for `workers` trainers.

    encoder_rate, trainer_rate: audio seconds per second of one actor, of one worker.
    missing: share of the audio that the cache lacks; lasting: in every epoch. spare: what the
    trainers leave of the cluster, in `unit` (GPUs or CPU cores); each: how much of it one actor
    asks for. Where less than that is left, one actor takes what there is.
    """
    fit = max(1, math.floor(spare / each + 1e-9)) if each else 1
    share = min(each, spare) if 0 < spare < each else each
    demand = workers * trainer_rate
    if missing <= 0:
        return Sizing(1, share, "1 encoder actor: the cache holds every utterance")
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
    return Sizing(actors, share, reason)


@dataclass(frozen=True)
class Played:
    """What a simulated run came to. Shares are of all encoders' or all trainers' time."""

    rate: float  # audio seconds per second
    trainers_wait: float
    encoders_wait: float

    @property
    def starving(self) -> str:
        """The side that waits for the other, where one of them does for over 5 % of its time."""
        if max(self.trainers_wait, self.encoders_wait) < 0.05:
            return "neither"
        return "trainers" if self.trainers_wait > self.encoders_wait else "encoders"


def simulate(
    encoders: int,
    trainers: int,
    *,
    encode_seconds: Sequence[float],
    train_seconds: Sequence[float],
    audio_seconds: float,
    sync_seconds: float = 0.0,
    steps: int = 60,
    ahead: int = 4,
    seed: int = 0,
) -> Played:
    """Play `steps` steps in which each trainer takes one block.

    encode_seconds, train_seconds: what a block costs, to draw from. audio_seconds: in a block.
    Encoders take blocks in order, at most `ahead` steps (and two blocks an encoder) before the
    trainers; a step begins when its last block is there and ends when the slowest trainer has
    finished and gradients are summed (`sync_seconds`). 0 encoders: everything lies in the cache.
    """
    generator = np.random.default_rng(seed)
    work = generator.choice(np.asarray(train_seconds), (steps, trainers))
    training = work.max(axis=1)
    encoding = generator.choice(np.asarray(encode_seconds), (steps, trainers))
    lead = max(ahead, -(-2 * encoders // trainers))
    free = [0.0] * encoders
    ended = [0.0] * (steps + 1)  # ended[s + 1]: end of step s
    busy = 0.0
    for step in range(steps):
        ready = 0.0
        allowed = ended[max(0, step - lead)]  # room in the buffer
        for seconds in encoding[step].tolist() if encoders else ():
            start = max(heapq.heappop(free), allowed)
            heapq.heappush(free, start + seconds)
            ready = max(ready, start + seconds)
            busy += seconds
        ended[step + 1] = max(ended[step], ready) + training[step] + sync_seconds
    # The first steps fill the pipeline.
    first = steps // 4
    span = ended[steps] - ended[first]
    share = (steps - first) / steps
    return Played(
        rate=(steps - first) * trainers * audio_seconds / span,
        trainers_wait=max(0.0, 1 - float(work[first:].sum()) / (trainers * span)),
        encoders_wait=max(0.0, 1 - busy * share / (encoders * span)) if encoders else 0.0,
    )


def best_split(
    devices: int, *, encode_seconds: Sequence[float], train_seconds: Sequence[float], **how: float
) -> tuple[int, int, Played]:
    """Encoders and trainers that make the most of `devices`, and what they achieve.

    Looks around the split that would balance mean rates.
    """
    encode, train = float(np.mean(encode_seconds)), float(np.mean(train_seconds))
    balanced = devices * encode / (encode + train)
    reach = max(2, devices // 16)
    low, high = max(1, math.floor(balanced) - 1), min(devices - 1, math.ceil(balanced) + reach)
    tried = sorted({*np.linspace(low, max(low, high), 12).round().astype(int).tolist()})
    splits = [
        (
            count,
            devices - count,
            simulate(
                count,
                devices - count,
                encode_seconds=encode_seconds,
                train_seconds=train_seconds,
                **how,  # type: ignore[arg-type]
            ),
        )
        for count in tried
    ]
    return max(splits, key=lambda split: split[2].rate)
