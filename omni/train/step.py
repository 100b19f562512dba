"""One optimizer step: gradients of the plan's next bins, and whether they may be applied."""

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
from omni.train.batches import Feed, Microbatch
from omni.train.distributed import all_sum
from omni.train.model_state import Trained

_SPIKE_AFTER = 100  # updates before a gradient norm can be called unusual
_NORM_MEMORY = 50  # updates


class Event(Protocol):
    def __call__(self, event: str, step: int | None = None, **facts: Any) -> None: ...


@dataclass(frozen=True)
class Step:
    """What a step did: sums over all ranks, the gradient norm, whether there was an update."""

    sums: StepSums
    norm: float
    updated: bool


class Steps:
    """asked_to_stop: whether this rank knows of a wish to stop. event: writes events.jsonl."""

    def __init__(
        self,
        config: Config,
        trained: Trained,
        feed: Feed,
        asked_to_stop: Callable[[], bool],
        event: Event,
        watch: Stopwatch,
    ) -> None:
        self.config, self._trained, self._feed = config, trained, feed
        self._watch = watch
        self._asked_to_stop, self._event = asked_to_stop, event

    def take(self, state: TrainState) -> Step:
        """Train the bins of step `state.step` (from 0), or skip them.

        Raises FloatingPointError after `optim.max_skips` steps in a row without an update.
        """
        micro = list(self._feed.microbatches(state.step))
        if state.step == self.config.optim.listen_steps:
            state.updates = 0  # the language model joins: its gradients are of another size
        sums, norm = self._gradients(micro, state.step)
        problem = self._problem(sums, norm, state)
        if problem is not None:
            # A flipped bit or a glitch of a device does not come twice; bad data does.
            self._event("recomputed", state.step + 1, reason=problem)
            self._trained.forget_gradients()
            sums, norm = self._gradients(micro, state.step)
            problem = self._problem(sums, norm, state)
        if problem is None:
            with self._watch.phase("optimizer"):
                self._trained.update(state.step)
            _remember(norm, state)
        else:
            self._skip(micro, problem, state)
        return Step(sums, norm, problem is None)

    def _gradients(self, micro: list[Microbatch], step: int) -> tuple[StepSums, float]:
        """Forward and backward of a step's blocks: sums over all ranks, and the gradient norm."""
        sums = StepSums(stop=float(self._asked_to_stop()))
        measured = []  # stays on the device: reading it there would wait for every microbatch
        for number, part in enumerate(micro):
            torch.manual_seed(_mix(self.config.run.seed, step, part.place))
            with self._trained.accumulating(last=number == len(micro) - 1):
                measured.append(self._backward(part, step < self.config.optim.listen_steps))
            sums += part.counts
        sums += StepSums.of_losses(torch.stack(measured).sum(dim=0).cpu())
        sums = StepSums.unpack(all_sum(sums.pack()))
        with self._watch.phase("optimizer"):
            norm = self._trained.gradient_norm(sums.tokens)
        return sums, norm

    def _backward(self, part: Microbatch, listen_only: bool) -> Tensor:
        """Forward and backward of one microbatch; gradients of sums, divided later."""
        with self._trained.autocast():
            with self._watch.phase("forward"):
                out: LossSums = self._trained.wrapped(part.batch, listen_only)
                optim = self.config.optim
                total = out.loss if optim.ce_weight == 1 else optim.ce_weight * out.loss
                total = total + optim.ctc_weight * out.ctc
                if optim.kl_weight:
                    total = total + optim.kl_weight * out.kl
            with self._watch.phase("backward"):
                total.backward()
        return pack_losses(out)

    # -- steps that must not count -------------------------------------------------------------

    def _problem(self, sums: StepSums, norm: float, state: TrainState) -> str | None:
        """Why these gradients must not be applied; the same answer on all ranks."""
        spike, mean = self.config.optim.spike, state.mean_norm
        reason = None
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            reason = f"the loss is {sums.loss / max(sums.tokens, 1):.4g}, gradient norm {norm:g}"
        elif spike is not None and state.updates >= _SPIKE_AFTER and norm > spike * mean:
            reason = f"the gradient norm is {norm:.4g}, {norm / mean:.3g} times the usual"
        if all_sum(torch.tensor([float(reason is not None)]))[0]:
            return reason or "another rank's gradients are not finite"
        return None

    def _skip(self, micro: list[Microbatch], problem: str, state: TrainState) -> None:
        """No update. The bins count as consumed, and the ledger says that they taught nothing."""
        self._trained.forget_gradients()
        state.skipped += 1
        state.skipped_in_row += 1
        culprits = self._feed.skip(state.step + 1, problem)
        bins = sorted(row["bin"] for row in culprits)
        self._event("skipped", state.step + 1, reason=problem, bins=bins)
        if state.skipped_in_row > self.config.optim.max_skips:
            ids = [i for row in culprits for i in row["ids"]]
            raise FloatingPointError(
                f"step {state.step + 1}: {state.skipped_in_row} steps in a row without usable "
                f"gradients ({problem}); the last one's bins: {', '.join(map(str, bins))}, "
                f"utterances: {', '.join(ids[:20])}{', ...' if len(ids) > 20 else ''}; "
                "try a lower optim.lr or a longer optim.warmup_steps"
            )


def _remember(norm: float, state: TrainState) -> None:
    """The usual gradient norm, with a memory of some updates."""
    state.updates += 1
    state.mean_norm += (norm - state.mean_norm) / min(state.updates, _NORM_MEMORY)
    state.skipped_in_row = 0


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
