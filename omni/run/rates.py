"""Measure the rates of one encoder and one trainer alone, on the first bins of a run.

Without Ray. `encoder.actors: auto` uses the rates, and benchmarks compare the stream with them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import torch

from omni.audio.windows import SAMPLING_RATE
from omni.config import Config, OptimConfig
from omni.plan.plan import Split, Steps, padded_step
from omni.plan.stream_order import Ranks, StreamOrder
from omni.stream.schema import LOADED_SCHEMA
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import StreamSettings
from omni.train.loop import TrainLoop
from omni.train.worker_spec import WorkerSpec


def first_rows(plan: Steps, bins: int, optim: OptimConfig) -> list[int]:
    """Return the bins of the plan's first steps, about `bins` of them, padded for one worker."""
    steps = max(1, bins // optim.bins_per_step)
    order = StreamOrder.of({"train": plan}, Ranks.all(1), optim.bins_per_block, (0, steps, steps))
    return [planned.bin for planned in order.all_bins()]


def loaded_blocks(
    split: Split, bins: Sequence[int], settings: StreamSettings
) -> tuple[list[pa.Table], float]:
    """Load blocks of log-mels without a cache; return them and the seconds taken."""
    began = time.perf_counter()
    rows = [load_bin(split.of_bin(number), number, settings, None) for number in bins]
    seconds = time.perf_counter() - began
    size = settings.bins_per_block
    blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [pa.Table.from_pylist(block, LOADED_SCHEMA) for block in blocks], seconds


def without_cache(settings: StreamSettings) -> StreamSettings:
    return replace(settings, cache=None)


def encoder_rate(
    stage: EncodeStage, blocks: Sequence[pa.Table], seconds: float
) -> tuple[float, list[pa.Table]]:
    """Return audio seconds per second of an encoder that never waits, and the encoded blocks.

    Encodes all blocks at least once, and repeats them for `seconds`. The stage must have no cache.
    """
    encoded = [stage(blocks[0])]  # The first call is slower.
    began = time.perf_counter()
    audio = 0.0
    passes = 0
    while passes == 0 or time.perf_counter() - began < seconds:
        for number, block in enumerate(blocks):
            out = stage(block)
            audio += audio_seconds(out)
            if passes == 0 and number:
                encoded.append(out)
        passes += 1
    return audio / (time.perf_counter() - began), encoded


def audio_seconds(block: pa.Table) -> float:
    return float(sum(sum(row) for row in block["samples"].to_pylist())) / SAMPLING_RATE


@dataclass(frozen=True)
class Cost:
    """Seconds of forward and backward pass per block, and of the update per step."""

    seconds: float
    update_seconds: float


class Trainer:
    """Training loop of one rank that repeats the blocks of `first_rows`.

    Writes into a temporary folder; the run that `spec` describes is not touched.
    """

    def __init__(self, spec: WorkerSpec, blocks: Sequence[pa.Table], device: torch.device) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._blocks = list(blocks)
        optim = spec.config.optim
        rows = padded_step(optim.bins_per_step, 1, optim.bins_per_block)
        self.blocks_per_step = rows // optim.bins_per_block
        self._steps = len(blocks) // self.blocks_per_step
        if not self._steps:
            raise ValueError(f"{len(blocks)} blocks do not make a step")
        run = spec.config.run.model_copy(update={"storage": self._folder.name})
        # Most steps run the language model.
        optim = optim.model_copy(update={"ctc_only_steps": 0})
        # The run itself reports rejects.
        data = spec.config.data.model_copy(update={"max_rejects": 1.0})
        config: Config = spec.config.model_copy(update={"run": run, "optim": optim, "data": data})
        config.run_dir.mkdir()
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
        spec = replace(spec, config=config)
        self._loop = TrainLoop(spec, self._cycle(), 0, 1, device)
        self._loop.model_state.model.train()

    def _cycle(self) -> Iterator[pa.Table]:
        while True:
            yield from self._blocks[: self._steps * self.blocks_per_step]

    def step(self) -> float:
        """Run an optimizer step; return its seconds of audio."""
        state = self._loop.state
        if state.step == self._steps:  # Repeat the blocks, and the plan with them.
            state.step = 0
        first = state.step * self.blocks_per_step
        self._loop.step()
        return sum(audio_seconds(b) for b in self._blocks[first : first + self.blocks_per_step])

    def cost(self, seconds: float) -> Cost:
        """Measure the mean cost over `seconds`, after one step of warm-up."""
        self.step()
        self._loop.recorder.watch.take()
        began, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - began < seconds:
            self.step()
            steps += 1
        spent = self._loop.recorder.watch.take()
        block = sum(spent[phase] for phase in ("copy", "forward", "backward"))
        return Cost(block / steps, spent["optimizer"] / steps)

    def rate(self, seconds: float, least: int = 3) -> float:
        """Measure audio seconds per second over `seconds`, after two steps of warm-up."""
        for _ in range(2):
            self.step()
        began, audio, steps = time.perf_counter(), 0.0, 0
        while steps < least or time.perf_counter() - began < seconds:
            audio += self.step()
            steps += 1
        return audio / (time.perf_counter() - began)
