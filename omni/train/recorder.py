"""Record metrics and events of one rank.

Rank 0 writes the files of the run. Every rank publishes its phases, and logs its own failures.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from omni.checkpoint.train_state import TrainState
from omni.metrics.rows import Measured, Pools, Window, summarize, train_row
from omni.metrics.run_files import (
    append_json,
    last_line,
    lease_of,
    read_json_lines,
    write_event,
    write_json,
)
from omni.metrics.table import EvalRow, TrainRow, to_json
from omni.metrics.throughput import (
    FirstSteps,
    Stopwatch,
    gpu_memory,
    own_seconds,
    peak_flops,
    training_flops,
)
from omni.stream.feature_cache import advice_when_full
from omni.train.batches import BlockReader
from omni.train.ledger import CurrentWork
from omni.train.model_state import ModelState
from omni.train.step import StepResult
from omni.train.worker_spec import WorkerSpec

_FAILURE_LOG_TIMEOUT = 5.0
"""Seconds that a failing rank may spend on logging why: storage may be the reason."""


class Publisher(Protocol):
    """Receiver of metrics beside the run's files, such as Prometheus."""

    def publish(self, name: str, value: float | Mapping[str, float]) -> None: ...

    def train_row(self, row: TrainRow, rejects: Mapping[str, int], cache_full: bool) -> None: ...

    def eval_row(self, row: EvalRow) -> None: ...


class Recorder:
    def __init__(
        self,
        spec: WorkerSpec,
        rank: int,
        world: int,
        device: torch.device,
        publisher: Publisher | None,
    ) -> None:
        self._spec, self._rank, self._world, self._device = spec, rank, world, device
        self._publisher = publisher
        self._run_dir = spec.config.run_dir
        self._metrics = self._run_dir / "metrics.jsonl"
        config = spec.config
        self._pools = Pools(spec.encoders, config.data.loaders, spec.nodes)
        self._first_steps = FirstSteps()
        self._peak_flops = peak_flops(device)
        self._cache_reported = False
        self._loss_reported = False
        self._halving_reported = False
        self._last_loss: float | None = None
        self.totals = Window()
        """Sums over all attempts."""
        self.watch = Stopwatch(device)
        """Seconds of this rank by phase."""
        self.window = Window()
        """Sums since the last log line."""
        self._inherited = Window()
        """The part of `window` that an earlier attempt brought."""

    def restore(self, state: TrainState) -> None:
        """Continue the sums of earlier attempts, and read the last loss that they logged."""
        if state.totals:
            self.totals = Window.from_dict(state.totals)
        if state.window:
            self.window, self._inherited = (Window.from_dict(state.window) for _ in range(2))
        for row in read_json_lines(self._metrics):
            if row.get("kind") == "train":
                self._last_loss = row.get("loss")
        if self._rank == 0:
            self._publish("omni_checkpoint_every", self._spec.config.train.checkpoint_every)
            self._publish("omni_checkpoint_step", state.step)
            self._publish("omni_checkpoint_time", time.time())

    def add_step(self, result: StepResult, spent: float, waited: float) -> None:
        """Add a step that took `spent` seconds, `waited` of them without a block."""
        first = self._first_steps.includes(spent, waited)
        for window in (self.window, self.totals):
            window.add(result.sums if result.updated else None, spent, waited, first)

    def log_steps(
        self, state: TrainState, norm: float, model_state: ModelState, reader: BlockReader
    ) -> None:
        """Log and publish the steps since the last call."""
        phases, inherited = self.watch.take(), self._inherited
        own_steps = self.window.steps - inherited.steps
        row = train_row(
            Measured(
                state,
                self.window,
                self._spec.config.optim.steps,
                model_state.learning_rate,
                norm,
                self._pools_of(inherited),
                phases,
                self._spec.tasks,
                self._utilisation(model_state),
            )
        )
        self._last_loss = row.loss
        self._publish("omni_phase_seconds", phases)
        self._publish("omni_rank_step_seconds", own_seconds(phases) / max(1, own_steps))
        for name, size in gpu_memory(self._device).items():
            self._publish(f"omni_gpu_{name}_bytes", size)
        if self._publisher is not None and self._rank == 0:
            full = reader.cache_full is not None
            self._publisher.train_row(row, reader.rejects.counts, full)
        # Without tokens every step of the window was skipped.
        if self._rank == 0 and self.window.sums.tokens:
            append_json(self._metrics, [{**to_json(row), **lease_of(self._run_dir)}])
        if reader.cache_full is not None:
            self._log_full_cache(reader.cache_full, state.step)
        sums, before = self.window.sums, inherited.sums
        if not self._spec.encoders and sums.encoded_samples > before.encoded_samples:
            self._log_lost_features(state.step)
        if sums.halvings > before.halvings:
            self._log_halving(state.step)
        self.window, self._inherited = Window(), Window()

    def log_evaluation(self, row: EvalRow) -> None:
        if self._rank == 0:
            append_json(self._metrics, [{**to_json(row), **lease_of(self._run_dir)}])
            if self._publisher is not None:
                self._publisher.eval_row(row)

    def log_checkpoint(self, step: int, seconds: float) -> None:
        """Publish that the checkpoint of a step was written in so many seconds."""
        self._publish("omni_checkpoint_step", step)
        self._publish("omni_checkpoint_time", time.time())
        self._publish("omni_checkpoint_write_seconds", seconds)

    def log_failed_checkpoint(self, step: int, reason: str, known: bool) -> None:
        """Count a write that storage refused, and log its reason unless it is known already."""
        self._publish("omni_checkpoint_failures", 1)
        if not known:
            self.log_own_event("checkpoint failed", step, reason=reason)

    def summarize(
        self, state: TrainState, results: dict[str, Any], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write summary.json and return it."""
        results = {"train_loss": self._last_loss, **results}
        summary = summarize(state, self.totals, self._pools_of(self.totals), results, facts)
        if self._rank == 0:
            write_json(self._run_dir / "summary.json", summary)
        return summary

    def _pools_of(self, sums: Window) -> Pools:
        """Return the pools; earlier attempts may have had encoders, where this one has none."""
        if not sums.sums.encode_seconds:
            return self._pools
        return replace(self._pools, encoders=self._spec.config.encoder.actor_count)

    def _publish(self, name: str, value: float | Mapping[str, float]) -> None:
        if self._publisher is not None:
            self._publisher.publish(name, value)

    def _utilisation(self, model_state: ModelState) -> float | None:
        """Return the language model's FLOPs as a share of what the devices could compute."""
        if self._peak_flops is None:
            return None
        optim, lm = self._spec.config.optim, model_state.model.lm
        flops = training_flops(lm, lm.head())
        positions = self.window.lm_steps * optim.bins_per_step * optim.bin_positions
        done = positions * flops.position + self.window.sums.counted * flops.supervised
        return done / (self.window.busy * self._peak_flops * self._world)

    def _log_full_cache(self, reason: str, step: int) -> None:
        """Log once that later epochs will encode again."""
        if self._cache_reported or self._rank:
            return
        self._cache_reported = True
        text = (
            f"the feature cache is full ({reason}): features that it lacks are encoded again in "
            f"every epoch; {advice_when_full(self._spec.config.encoder.format)}"
        )
        append_json(self._metrics, [{"kind": "note", "step": step, "text": text}])

    def _log_lost_features(self, step: int) -> None:
        """Log once that an attempt without encoders met features that are gone."""
        if self._loss_reported or self._rank:
            return
        self._loss_reported = True
        text = (
            "features that the cache held at the start are damaged or gone: a task encodes them "
            "again, block by block; the run has encoders again once it is stopped and continued"
        )
        append_json(self._metrics, [{"kind": "note", "step": step, "text": text}])

    def _log_halving(self, step: int) -> None:
        """Log once that an encoder has too little memory for its batches."""
        if self._halving_reported or self._rank:
            return
        self._halving_reported = True
        text = (
            "an encoder ran out of memory and halved its batches, which stay so: features are the "
            "same; a lower encoder.frame_budget, or more encoder.gpu_memory, avoids the attempts"
        )
        append_json(self._metrics, [{"kind": "note", "step": step, "text": text}])

    # -- events --------------------------------------------------------------------------------

    def log_event(self, event: str, step: int | None, **facts: Any) -> None:
        """Log an event that concerns all ranks, on rank 0."""
        if self._rank == 0:
            self.log_own_event(event, step, **facts)

    def log_own_event(self, event: str, step: int | None, **facts: Any) -> None:
        """Log an event of this rank."""
        write_event(self._run_dir, event, step, rank=self._rank, **facts)

    def log_stall(self, doing: str, seconds: float, work: CurrentWork) -> None:
        reason = f"rank {self._rank} made no progress for {seconds:.0f} s: {doing}"
        self.log_own_event("stalled", **work, reason=reason)

    def log_failure(self, error: Exception, work: CurrentWork) -> None:
        """Log the failing step with its bins and utterances; give the storage 5 s at most."""
        reason = f"{type(error).__name__}: {last_line(error)}"
        write = functools.partial(self.log_own_event, "rank failed", **work, reason=reason)
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(_FAILURE_LOG_TIMEOUT)
