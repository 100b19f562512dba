"""What a run writes down about itself: rows of metrics.jsonl, and the figures of its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni.model.logmel import SAMPLING_RATE
from omni.score import Errors
from omni.train.checkpoint import TrainState
from omni.train.step import (
    CORRECT,
    CTC,
    ENCODE_SECONDS,
    ENCODED,
    LOSS,
    SAMPLES,
    SUMS,
    TOKENS,
    UTTERANCES,
)


@dataclass
class Window:
    """Sums over the steps since the last log line, over all ranks."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(SUMS, dtype=torch.float64))
    busy: float = 0.0  # seconds of steps; evaluation and checkpoints are not counted
    wait: float = 0.0  # seconds of them without a block


def train_row(
    state: TrainState, window: Window, steps: int, rate: float, norm: float
) -> dict[str, Any]:
    """A logged step: means over the window, rates per second of its steps."""
    sums, busy = window.sums.tolist(), window.busy
    tokens = max(sums[TOKENS], 1)
    return {
        "kind": "train",
        "step": state.step,
        "steps": steps,
        "epoch": round(state.epoch, 4),
        "seconds": round(state.seconds, 2),
        "loss": sums[LOSS] / tokens,
        "accuracy": sums[CORRECT] / tokens,
        "ctc": sums[CTC] / tokens,
        "lr": rate,
        "grad_norm": norm,
        "bins": state.bins_consumed,
        "utterances": int(sums[UTTERANCES]),
        "audio_seconds_per_second": sums[SAMPLES] / SAMPLING_RATE / busy,
        "tokens_per_second": sums[TOKENS] / busy,
        "data_wait_fraction": min(1.0, window.wait / busy),
        "encode_seconds": sums[ENCODE_SECONDS],  # of all actors, for the audio of these steps
        "encoded_audio_seconds": sums[ENCODED] / SAMPLING_RATE,
        "step_seconds": busy,
        "skipped": state.skipped,
    }


def eval_row(
    state: TrainState, losses: dict[str, float], errors: Errors, examples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """An evaluation on dev."""
    return {
        "kind": "eval",
        "step": state.step,
        "epoch": round(state.epoch, 4),
        "seconds": round(state.seconds, 2),
        "dev_loss": losses["loss"],
        "dev_accuracy": losses["accuracy"],
        "shuffled_audio_gap": losses["gap"],
        "dev_wer": errors.wer,
        "dev_cer": errors.cer,
        "examples": [
            {name: row[name] for name in ("id", "reference", "hypothesis")} for row in examples
        ],
    }


def summary_of(
    state: TrainState, totals: Window, results: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """summary.json: results, and rates over the steps of the last attempt."""
    sums, busy = totals.sums.tolist(), max(totals.busy, 1e-9)
    encode = sums[ENCODE_SECONDS]
    return {
        "steps": state.step,
        "epochs": round(state.epoch, 3),
        **results,
        "audio_seconds_per_second": sums[SAMPLES] / SAMPLING_RATE / busy,
        "tokens_per_second": sums[TOKENS] / busy,
        "data_wait_fraction": min(1.0, totals.wait / busy),
        "encoder_audio_seconds_per_second": (
            sums[ENCODED] / SAMPLING_RATE / encode if sums[ENCODED] else None
        ),
        "cached_fraction": 1 - sums[ENCODED] / sums[SAMPLES] if sums[SAMPLES] else None,
        "train_seconds": round(state.seconds, 1),
        "skipped_steps": state.skipped,
        **facts,
    }
