"""Run one optimizer step: accumulate gradients of the plan's next bins, check them, apply them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from omni.checkpoint.train_state import TrainState
from omni.config import Config
from omni.metrics.sums import pack_losses
from omni.metrics.table import StepSums
from omni.metrics.throughput import Stopwatch
from omni.model.speech_lm import LossSums
from omni.train.batches import BlockReader, Microbatch
from omni.train.distributed import all_sum
from omni.train.model_state import ModelState

_SPIKE_AFTER = 100
"""Updates before a gradient norm can count as a spike."""
_NORM_MEMORY = 50
"""Updates that the mean gradient norm remembers."""
_MAX_IDS = 20
"""Utterance ids in an error message."""


class LogEvent(Protocol):
    def __call__(self, event: str, step: int | None = None, **facts: Any) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks, gradient norm before clipping, and whether there was an update."""

    sums: StepSums
    norm: float
    updated: bool


class StepRunner:
    """Run steps on one rank, in lockstep with the others.

    stop_requested: tells whether this rank has seen a stop request; the sums share it.
    log_event: writes events.jsonl.
    """

    def __init__(
        self,
        config: Config,
        model_state: ModelState,
        reader: BlockReader,
        stop_requested: Callable[[], bool],
        log_event: LogEvent,
        watch: Stopwatch,
    ) -> None:
        self._config, self._model_state, self._reader = config, model_state, reader
        self._stop_requested, self._log_event = stop_requested, log_event
        self._watch = watch

    def run(self, state: TrainState) -> StepResult:
        """Train the bins of step `state.step` (from 0), or skip them.

        Raises FloatingPointError after `optim.max_skips` steps in a row without an update.
        """
        micro = list(self._reader.microbatches(state.step))
        if state.step == self._config.optim.ctc_only_steps:
            # With the language model in the loss, gradients have another magnitude.
            state.updates = 0
        sums, norm = self._gradients(micro, state.step)
        problem = self._find_problem(sums, norm, state)
        if problem is not None:
            # A flipped bit or a glitch of a device does not repeat; bad data does.
            self._log_event("recomputed", state.step + 1, reason=problem)
            self._model_state.clear_gradients()
            sums, norm = self._gradients(micro, state.step)
            problem = self._find_problem(sums, norm, state)
        if problem is None:
            with self._watch.phase("optimizer"):
                self._model_state.update(state.step)
            _update_mean_norm(norm, state)
        else:
            self._skip(problem, state)
        return StepResult(sums, norm, problem is None)

    def _gradients(self, micro: list[Microbatch], step: int) -> tuple[StepSums, float]:
        """Run forward and backward passes; return sums over all ranks and the gradient norm."""
        sums = StepSums(stop=float(self._stop_requested()))
        # Losses stay on the device: reading them here would wait for every microbatch.
        losses = []
        self._model_state.fit_summary(part.batch for part in micro)
        for number, part in enumerate(micro):
            torch.manual_seed(_combine_seeds(self._config.run.seed, step, part.block))
            with self._model_state.accumulating(last=number == len(micro) - 1):
                ctc_only = step < self._config.optim.ctc_only_steps
                losses.append(self._backward(part, ctc_only))
            sums += part.counts
        sums += StepSums.of_losses(torch.stack(losses).sum(dim=0).cpu())
        sums = StepSums.unpack(all_sum(sums.pack()))
        with self._watch.phase("optimizer"):
            norm = self._model_state.gradient_norm(sums.tokens)
        return sums, norm

    def _backward(self, part: Microbatch, ctc_only: bool) -> Tensor:
        """Run one microbatch forward and backward. Losses are sums; `gradient_norm` divides."""
        optim = self._config.optim
        with self._model_state.autocast():
            with self._watch.phase("forward"):
                out: LossSums = self._model_state.losses(part.batch, ctc_only)
                total = out.loss if optim.ce_weight == 1 else optim.ce_weight * out.loss
                total = total + optim.ctc_weight * out.ctc
                if optim.kl_weight:
                    total = total + optim.kl_weight * out.kl
            with self._watch.phase("backward"):
                total.backward()
        return pack_losses(out)

    # -- steps without an update ---------------------------------------------------------------

    def _find_problem(self, sums: StepSums, norm: float, state: TrainState) -> str | None:
        """Return why these gradients must not be applied, or None; ranks agree on which."""
        spike, mean = self._config.optim.spike, state.mean_norm
        reason = None
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            reason = f"the loss is {sums.loss / max(sums.tokens, 1):.4g}, gradient norm {norm:g}"
        elif spike is not None and state.updates >= _SPIKE_AFTER and norm > spike * mean:
            reason = f"the gradient norm is {norm:.4g}, {norm / mean:.3g} times the mean"
        if all_sum(torch.tensor([float(reason is not None)]))[0]:
            return reason or "another rank's gradients are not finite"
        return None

    def _skip(self, problem: str, state: TrainState) -> None:
        """Consume the bins without an update, and mark them as skipped in the ledger."""
        self._model_state.clear_gradients()
        state.skipped += 1
        state.skipped_in_row += 1
        skipped = self._reader.ledger.mark_skipped(problem)
        bins = sorted(row["bin"] for row in skipped)
        self._log_event("skipped", state.step + 1, reason=problem, bins=bins)
        if state.skipped_in_row > self._config.optim.max_skips:
            ids = [name for row in skipped for name in row["ids"]]
            raise FloatingPointError(
                f"step {state.step + 1}: {state.skipped_in_row} steps in a row without usable "
                f"gradients ({problem}); bins of the last one: {', '.join(map(str, bins))}, "
                f"utterances: {', '.join(ids[:_MAX_IDS])}{', ...' if len(ids) > _MAX_IDS else ''}; "
                "try a lower optim.lr or a longer optim.warmup_steps"
            )


def _update_mean_norm(norm: float, state: TrainState) -> None:
    state.updates += 1
    state.mean_norm += (norm - state.mean_norm) / min(state.updates, _NORM_MEMORY)
    state.skipped_in_row = 0


def _combine_seeds(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
