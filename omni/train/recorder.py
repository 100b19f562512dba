"""What one rank writes down while it trains: logged steps and evaluations, events, notes.

Rank 0 writes about the run; every rank tells its publisher where its time went, and leaves word
when it fails or hangs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from omni.checkpoint.train_state import TrainState
from omni.metrics.rows import Measured, Pools, Window, summarize, train_row
from omni.metrics.run_files import append_json, last_line, read_json_lines, write_event, write_json
from omni.metrics.table import EvalRow, TrainRow, to_json
from omni.metrics.throughput import Stopwatch, flops_per_position, peak_flops
from omni.stream.feature_cache import advice_when_full
from omni.train.batches import Feed
from omni.train.model_state import Trained
from omni.train.step import Step
from omni.train.worker_spec import WorkerSpec

_LAST_WORDS_SECONDS = 5.0


class Publisher(Protocol):
    """Who else hears what is logged: a dashboard."""

    def phases(self, seconds: Mapping[str, float]) -> None: ...

    def gpu_memory(self, peak: int) -> None: ...

    def train_row(self, row: TrainRow, rejects: Mapping[str, int], cache_full: bool) -> None: ...

    def eval_row(self, row: EvalRow) -> None: ...


class Books:
    """Of one rank. watch: seconds by phase, for whoever does the work to measure with."""

    def __init__(
        self,
        job: WorkerSpec,
        rank: int,
        world: int,
        device: torch.device,
        publisher: Publisher | None,
    ) -> None:
        self._job, self._rank, self._device = job, rank, device
        self._publisher = publisher
        self._run_dir = job.config.run_dir
        self._metrics = self._run_dir / "metrics.jsonl"
        self.watch = Stopwatch(device)
        self._pools = Pools(job.config.encoder.actor_count, job.config.data.loaders)
        self._peak = peak_flops(device)
        self._world = world
        self._said_full = False
        self.window = Window()  # since the last log line
        self._totals = Window()
        self._last_loss: float | None = None

    def recall(self) -> None:
        """The last step that an earlier attempt logged."""
        for row in read_json_lines(self._metrics):
            if row.get("kind") == "train":
                self._last_loss = row.get("loss")

    def count(self, done: Step, spent: float, waited: float) -> None:
        """A step that took `spent` seconds, `waited` of them without a block."""
        for window in (self.window, self._totals):
            window.busy += spent
            window.steps += 1
            window.wait += waited
            if done.updated:
                window.sums += done.sums

    def log(self, state: TrainState, norm: float, trained: Trained, feed: Feed) -> None:
        """Write down the steps since the last log line."""
        phases = self.watch.take()  # of this rank
        row = train_row(
            Measured(
                state,
                self.window,
                self._job.config.optim.steps,
                trained.rate,
                norm,
                self._pools,
                phases,
                self._job.tasks,
                self._full_speed(trained),
            )
        )
        self._last_loss = row.loss
        if self._publisher is not None:
            self._publisher.phases(phases)
            if self._rank == 0:
                full = feed.cache_full is not None
                self._publisher.train_row(row, feed.reject_counts, full)
            if self._device.type == "cuda":
                self._publisher.gpu_memory(torch.cuda.max_memory_allocated(self._device))
        if self._rank == 0 and self.window.sums.tokens:  # else every step was skipped
            append_json(self._metrics, [to_json(row)])
        self._note_full_cache(feed, state.step)
        feed.write_ledger()
        self.window = Window()

    def _full_speed(self, trained: Trained) -> float | None:
        """Steps a second of devices that do nothing but the language model's products."""
        if self._peak is None:
            return None
        optim = self._job.config.optim
        positions = optim.bins_per_step * optim.bin_positions
        return self._peak * self._world / (positions * flops_per_position(trained.model.lm))

    def _note_full_cache(self, feed: Feed, step: int) -> None:
        """Say once that later epochs will encode again."""
        if feed.cache_full is None or self._said_full or self._rank:
            return
        self._said_full = True
        note = (
            f"the feature cache is full ({feed.cache_full}): what it lacks is encoded again in "
            f"every epoch; {advice_when_full(self._job.config.encoder.format)}"
        )
        append_json(self._metrics, [{"kind": "note", "step": step, "text": note}])

    def evaluated(self, entry: EvalRow) -> None:
        """An evaluation, as `eval_row` makes it."""
        if self._rank == 0:
            append_json(self._metrics, [to_json(entry)])
            if self._publisher is not None:
                self._publisher.eval_row(entry)

    def summarize(
        self, state: TrainState, results: dict[str, Any], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write and return the summary."""
        results = {"train_loss": self._last_loss, **results}
        summary = summarize(state, self._totals, self._pools, results, facts)
        if self._rank == 0:
            write_json(self._run_dir / "summary.json", summary)
        return summary

    # -- events --------------------------------------------------------------------------------

    def event(self, event: str, step: int | None, **facts: Any) -> None:
        """Something that befell all ranks: rank 0 writes it."""
        if self._rank == 0:
            write_event(self._run_dir, event, step, rank=0, **facts)

    def own_event(self, event: str, step: int | None, **facts: Any) -> None:
        """Something that befell this rank."""
        write_event(self._run_dir, event, step, rank=self._rank, **facts)

    def stalled(self, doing: str, seconds: float, feed: Feed) -> None:
        why = f"rank {self._rank} made no progress for {seconds:.0f} s: {doing}"
        self.own_event("stalled", **feed.at_work(), reason=why)

    def failed(self, error: Exception, feed: Feed) -> None:
        """What this rank was at when it failed; the storage may be the reason, so not for long."""
        reason = f"{type(error).__name__}: {last_line(error)}"
        write = functools.partial(self.own_event, "rank failed", **feed.at_work(), reason=reason)
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(_LAST_WORDS_SECONDS)
