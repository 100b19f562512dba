"""What limits a run's throughput, from how busy each stage was."""

from __future__ import annotations

from dataclasses import dataclass

_TRAINING = 0.9  # share of its time that a trainer trains: then nothing else is worth changing
_BUSY = 0.6  # share of its time from which a stage is what the others wait for

ADVICE = {
    "trainer": "more train.workers, or a smaller model; another encoder would change nothing",
    "encoder": "more encoder.actors, a larger encoder.gpus share, or jobs.encode ahead of training "
    "(not with augment: it is encoded in every epoch)",
    "decode": "more data.loaders, or faster storage",
    "network": "fewer, larger blocks (optim.bins_per_block), more data.buffer_mb, or encoders on "
    "the trainers' nodes",
}


@dataclass(frozen=True)
class Verdict:
    """limit: a name in `ADVICE`. share: how busy that stage is, or for network how long trainers
    wait, of 1. trainer, encoder, decode: how busy each is.
    """

    limit: str
    share: float
    trainer: float
    encoder: float
    decode: float

    def __str__(self) -> str:
        waits = f"trainers wait {1 - self.trainer:.0%}"
        if self.limit == "trainer":
            return f"trainer-bound: trainers are busy {self.trainer:.0%} of the time"
        if self.limit == "network":
            return (
                f"network-bound: {waits} of the time, encoders are busy {self.encoder:.0%}, "
                f"loaders {self.decode:.0%}"
            )
        who = {"encoder": "encoders", "decode": "loaders"}[self.limit]
        return f"{self.limit}-bound: {who} are busy {self.share:.0%} of the time, {waits}"


def judge(
    seconds: float,
    *,
    waited: float,
    encode_seconds: float,
    encoders: int,
    load_seconds: float,
    loaders: int,
) -> Verdict:
    """From `seconds` of training steps, of which a trainer waited `waited` for data.

    encode_seconds, load_seconds: the work of all encoders and of all loading tasks for the audio of
    these steps. A stage that runs ahead into a buffer can seem busier than one: that counts as one.
    """
    seconds = max(seconds, 1e-9)
    trainer = 1 - min(1.0, waited / seconds)
    busy = {
        "encoder": min(1.0, encode_seconds / (seconds * max(1, encoders))),
        "decode": min(1.0, load_seconds / (seconds * max(1, loaders))),
    }
    most = max(busy, key=lambda name: busy[name])
    if trainer >= _TRAINING:
        limit, share = "trainer", trainer
    elif busy[most] >= _BUSY:
        limit, share = most, busy[most]
    else:
        limit, share = "network", 1 - trainer
    return Verdict(limit, share, trainer, busy["encoder"], busy["decode"])
