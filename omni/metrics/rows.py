"""What a run writes down about itself: rows of metrics.jsonl, and the figures of its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni.audio.logmel import SAMPLING_RATE
from omni.checkpoint.checkpoint import TrainState
from omni.metrics.score import Errors
from omni.metrics.sums import (
    CORRECT,
    CTC,
    ENCODE_SECONDS,
    ENCODED,
    KL,
    LOAD_SECONDS,
    LOSS,
    SAMPLES,
    SUMS,
    TOKENS,
    UTTERANCES,
)
from omni.metrics.throughput import ADVICE, Verdict, judge


@dataclass(frozen=True)
class Pools:
    """How many of each stage feed the trainers."""

    encoders: int
    loaders: int


@dataclass
class Window:
    """Sums over the steps since the last log line, over all ranks."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(SUMS + 3, dtype=torch.float64))
    busy: float = 0.0  # seconds of steps; evaluation and checkpoints are not counted
    wait: float = 0.0  # seconds of them without a block
    steps: int = 0

    @classmethod
    def of(cls, tasks: int) -> Window:
        return cls(torch.zeros(SUMS + 3 * tasks, dtype=torch.float64))

    def verdict(self, pools: Pools) -> Verdict:
        return judge(
            self.busy,
            waited=self.wait,
            encode_seconds=float(self.sums[ENCODE_SECONDS]),
            encoders=pools.encoders,
            load_seconds=float(self.sums[LOAD_SECONDS]),
            loaders=pools.loaders,
        )


def by_task(key: str, names: Sequence[str], sums: Tensor) -> dict[str, Any]:
    """Loss and accuracy of each task, where there are several. sums: (tasks, 3), see `LossSums`."""
    if len(names) < 2:
        return {}
    return {
        key: {
            name: {"loss": loss / tokens, "accuracy": right / tokens, "tokens": int(tokens)}
            for name, (loss, tokens, right) in zip(names, sums.tolist(), strict=True)
            if tokens
        }
    }


def train_row(
    state: TrainState,
    window: Window,
    steps: int,
    rate: float,
    norm: float,
    pools: Pools,
    names: Sequence[str] = (),
    full_speed: float | None = None,
) -> dict[str, Any]:
    """A logged step: means over the window, rates per second of its steps.

    full_speed: steps a second if all devices did nothing but the model's products (omni/train/mfu).
    """
    sums, busy = window.sums.tolist(), window.busy
    verdict = window.verdict(pools)
    tokens = max(sums[TOKENS], 1e-9)
    counted = float(window.sums[SUMS + 1 :: 3].sum())
    return {
        "kind": "train",
        "step": state.step,
        "steps": steps,
        "epoch": round(state.epoch, 4),
        "seconds": round(state.seconds, 2),
        # Nothing was counted where the language model was left out (optim.listen_steps).
        "loss": sums[LOSS] / tokens if counted else None,
        "accuracy": sums[CORRECT] / counted if counted else None,
        "ctc": sums[CTC] / tokens,
        **({"kl": sums[KL] / tokens} if sums[KL] else {}),
        **by_task("tasks", names, window.sums[SUMS:].view(-1, 3)),
        "lr": rate,
        "grad_norm": norm,
        "bins": state.bins_consumed,
        "utterances": int(sums[UTTERANCES]),
        "audio_seconds_per_second": sums[SAMPLES] / SAMPLING_RATE / busy,
        "tokens_per_second": counted / busy,
        "data_wait_fraction": min(1.0, window.wait / busy),
        "mfu": window.steps / busy / full_speed if full_speed else None,
        "limit": verdict.limit,
        "busy": {
            "trainer": verdict.trainer,
            "encoder": verdict.encoder,
            "decode": verdict.decode,
        },
        "load_seconds": sums[LOAD_SECONDS],  # of all loading tasks, the same
        "encode_seconds": sums[ENCODE_SECONDS],  # of all actors, for the audio of these steps
        "encoded_audio_seconds": sums[ENCODED] / SAMPLING_RATE,
        "step_seconds": busy,
        "skipped": state.skipped,
    }


def eval_row(
    state: TrainState,
    losses: dict[str, Any],
    errors: Errors,
    examples: Sequence[dict[str, Any]],
    names: Sequence[str] = (),
    layers: dict[str, float] | None = None,
    languages: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """An evaluation on dev. names: of the tasks; layers: weights of the encoder's; languages: their
    error rates, where there are several.
    """
    return {
        "kind": "eval",
        "step": state.step,
        "epoch": round(state.epoch, 4),
        "seconds": round(state.seconds, 2),
        "dev_loss": losses["loss"],
        "dev_accuracy": losses["accuracy"],
        "shuffled_audio_gap": losses["gap"],
        **({"dev_ctc": losses["ctc"]} if losses["ctc"] else {}),
        **({"dev_kl": losses["kl"]} if losses["kl"] else {}),
        **by_task("dev_tasks", names, losses["tasks"]),
        **({"layers": layers} if layers else {}),
        "dev_wer": errors.wer,
        "dev_cer": errors.cer,
        **({"dev_languages": languages} if languages else {}),
        "examples": [
            {name: row[name] for name in ("id", "reference", "hypothesis")} for row in examples
        ],
    }


def summary_of(
    state: TrainState,
    totals: Window,
    pools: Pools,
    results: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """summary.json: results, and rates over the steps of the last attempt."""
    sums, busy = totals.sums.tolist(), max(totals.busy, 1e-9)
    verdict = totals.verdict(pools)
    encode = sums[ENCODE_SECONDS]
    return {
        "steps": state.step,
        "epochs": round(state.epoch, 3),
        **results,
        "audio_seconds_per_second": sums[SAMPLES] / SAMPLING_RATE / busy,
        "tokens_per_second": float(totals.sums[SUMS + 1 :: 3].sum()) / busy,
        "data_wait_fraction": min(1.0, totals.wait / busy),
        "throughput_limit": verdict.limit,
        "throughput_verdict": str(verdict),
        "throughput_advice": ADVICE[verdict.limit],
        "encoder_audio_seconds_per_second": (
            sums[ENCODED] / SAMPLING_RATE / encode if sums[ENCODED] else None
        ),
        "cached_fraction": 1 - sums[ENCODED] / sums[SAMPLES] if sums[SAMPLES] else None,
        "train_seconds": round(state.seconds, 1),
        "skipped_steps": state.skipped,
        **facts,
    }
