"""Throughput of a run: seconds by phase, the stage that limits it, and model FLOPs utilisation."""

from __future__ import annotations

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PHASES = ("wait", "copy", "forward", "backward", "optimizer", "evaluate", "checkpoint")


class Stopwatch:
    """Add up seconds by phase.

    Work on a GPU is timed by CUDA events, which are only read in `take`: waiting for them earlier
    would keep the host from queueing the next work.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str, on_device: bool = True) -> Iterator[None]:
        """Time a block of code; on_device: by CUDA events if there is a GPU."""
        if self._gpu and on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, begin, end))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of every phase and reset them. Waits for the last CUDA event."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        taken = {name: self._seconds.get(name, 0.0) for name in PHASES}
        self._seconds.clear()
        return taken


def own_seconds(phases: Mapping[str, float]) -> float:
    """Return the seconds of a rank's phases in which it waited neither for data nor for a rank.

    Gradients are summed over ranks in the backward pass. With FSDP the forward pass gathers
    parameters, and so waits for the other ranks as well.
    """
    return phases["copy"] + phases["forward"]


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Return the bytes of a GPU by what they are; empty for a CPU.

    memory: largest sum of tensors so far. reserved: held by torch, for tensors or to be used again.
    free: not held by any process. size: of the GPU.
    """
    if device.type != "cuda":
        return {}
    free, size = torch.cuda.mem_get_info(device)
    return {
        "memory": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "free": free,
        "size": size,
    }


# -- the stage that limits throughput ----------------------------------------------------------

_TRAINER_BOUND = 0.9  # busy share of the trainer from which no other change would help
_STAGE_BOUND = 0.6  # busy share of a stage from which the trainer waits for it
_FIRST_STEPS = 20  # Steps of an attempt, at most, that may wait for the stream to fill.

ADVICE = {
    "trainer": "more train.workers, or a smaller model; another encoder would change nothing",
    "encoder": "more encoder.actors, a larger encoder.gpus share, or jobs.encode ahead of training "
    "(not with augment: it is encoded in every epoch)",
    "decode": "more data.loaders, or faster storage",
    "network": "larger blocks (data.block_seconds, data.block_mb), more data.buffer_mb, or "
    "encoders on the trainers' nodes",
    "stream": "larger blocks (data.block_seconds, data.block_mb), or more data.buffer_mb",
    "start": "nothing: the stream fills while the first steps wait; later lines tell",
}


@dataclass(frozen=True)
class Verdict:
    """limit: the stage that limits throughput, a key of `ADVICE`.

    network: blocks travel between nodes; stream: the same on one node; start: the first blocks of
    an attempt are still being made. share: the busy share of that stage, for these three the share
    of the time that trainers wait. busy: the busy share of each stage. encoders: their number; 0:
    all features are cached.
    """

    limit: str
    share: float
    busy: dict[str, float]
    encoders: int = 1

    def __str__(self) -> str:
        cached = "" if self.encoders else "; no encoders: all features are cached"
        return self._limit + cached

    @property
    def _limit(self) -> str:
        trainer = self.busy["trainer"]
        waits = f"trainers wait {1 - trainer:.0%}"
        if self.limit == "trainer":
            return f"trainer-bound: trainers are busy {trainer:.0%} of the time"
        if self.limit in ("network", "stream"):
            encoders = f"encoders are busy {self.busy['encoder']:.0%}, " if self.encoders else ""
            loaders = f"loaders {'' if encoders else 'are busy '}{self.busy['decode']:.0%}"
            return f"{self.limit}-bound: {waits} of the time, {encoders}{loaders}"
        if self.limit == "start":
            return f"waiting for the first blocks: {waits} of the time"
        stage = {"encoder": "encoders", "decode": "loaders"}[self.limit]
        return f"{self.limit}-bound: {stage} are busy {self.share:.0%} of the time, {waits}"


def judge(
    seconds: float,
    *,
    waited: float,
    encode_seconds: float,
    encoders: int,
    load_seconds: float,
    loaders: int,
    nodes: int = 1,
    starting: bool = False,
) -> Verdict:
    """Find the stage that limits `seconds` of training steps.

    waited: seconds that a trainer waited for data. encode_seconds, load_seconds: work of all
    encoders and of all loading tasks for the audio of these steps. A stage that runs ahead into a
    buffer can do more than `seconds` of work; its busy share is then 1. nodes: of the cluster.
    starting: these are the first steps of an attempt.
    """
    seconds = max(seconds, 1e-9)
    trainer = 1 - min(1.0, waited / seconds)
    stages = {
        "encoder": min(1.0, encode_seconds / (seconds * max(1, encoders))),
        "decode": min(1.0, load_seconds / (seconds * max(1, loaders))),
    }
    busiest = max(stages, key=lambda name: stages[name])
    if trainer >= _TRAINER_BOUND:
        limit, share = "trainer", trainer
    elif starting:
        limit, share = "start", 1 - trainer
    elif stages[busiest] >= _STAGE_BOUND:
        limit, share = busiest, stages[busiest]
    else:
        limit, share = "network" if nodes > 1 else "stream", 1 - trainer
    return Verdict(limit, share, {"trainer": trainer, **stages}, encoders)


class FirstSteps:
    """Tell the first steps of an attempt, which wait for the stream to fill, from later ones."""

    def __init__(self) -> None:
        self._left = _FIRST_STEPS

    def includes(self, spent: float, waited: float) -> bool:
        """Return whether a step is one of them: all until one waits for less than half its time."""
        waiting = self._left > 0 and 2 * waited >= spent
        self._left = self._left - 1 if waiting else 0
        return waiting


# -- model FLOPs utilisation -------------------------------------------------------------------

# Dense bf16 FLOP/s from the vendors' data sheets, without sparsity.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 FLOP/s of a GPU; None for a CPU and for unknown GPUs."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """name: as the driver gives it, such as "NVIDIA H100 80GB HBM3"."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in _PEAKS.items() if f" {known} " in words), None)


# GiB as the vendors' data sheets have them; the largest where a GPU is sold with several.
_MEMORY = {
    "B200": 180,
    "H200": 141,
    "H100 NVL": 94,
    "H100": 80,
    "A100": 80,
    "L40S": 48,
    "L4": 24,
    "A10G": 24,
    "A10": 24,
    "RTX 4090": 24,
    "RTX 3090": 24,
}


def memory_of(name: str) -> int | None:
    """Return the bytes of a GPU's memory by its name, such as "A100-40G"; None if not known."""
    words = f" {name.replace('-', ' ')} "
    known = next((size for known, size in _MEMORY.items() if f" {known} " in words), None)
    said = re.search(r" (\d+)GB? ", words)
    if known is None:
        return None
    return (int(said[1]) if said else known) << 30


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a forward and backward pass of a language model."""

    position: int
    """For each position, through the layers."""
    supervised: int
    """For each supervised position, through the head: nobody needs the other logits."""


def training_flops(model: nn.Module, head: nn.Linear) -> TrainingFlops:
    """Count 6 FLOPs for each weight (Kaplan et al. 2020, arXiv:2001.08361), 4 for a frozen one.

    The gradient of a frozen weight is not computed. head: the layer of `model` that computes the
    logits. The products of attention and embedding tables are left out.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = sum(
        _flops(parameter)
        for parameter in model.parameters()
        if parameter.ndim >= 2 and id(parameter) not in {*tables, id(head.weight)}
    )
    return TrainingFlops(layers, _flops(head.weight))


def _flops(weight: Tensor) -> int:
    return (6 if weight.requires_grad else 4) * weight.numel()
