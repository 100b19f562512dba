"""Evaluation during training: loss, accuracy, shuffled-audio gap and greedy WER, over all ranks.

Each rank keeps the dev and test utterances that the stream brought it at the start, so an
evaluation reads nothing and encodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.config import Config
from omni.inference.decode_batch import HeldUtterance, summarize, transcribe
from omni.metrics.score import Errors
from omni.model.batch import Batch
from omni.model.chat_template import Template
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.plan.packing import pack
from omni.plan.sequences import sequence_positions
from omni.stream.collate import Utterance, collate
from omni.train.distributed import all_gather, all_sum

_SUMS = 5  # loss, tokens, correct, ctc, kl; behind them those of each task


@dataclass(frozen=True)
class Layout:
    """How utterances become batches."""

    positions: int
    stack: int
    frame_dim: int
    teacher: bool = False

    @classmethod
    def of(cls, config: Config, model: OmniConfig) -> Layout:
        teacher = config.optim.kl_weight > 0
        return cls(config.optim.bin_positions, model.stack, model.frame_dim, teacher)

    def batch(self, bins: list[list[Utterance]]) -> Batch:
        return collate(
            bins,
            positions=self.positions,
            stack=self.stack,
            frame_dim=self.frame_dim,
            teacher=self.teacher,
        )

    def length(self, utterance: Utterance) -> int:
        """Positions that an utterance takes."""
        frames = [len(part) for part in utterance.features or ()]
        return sequence_positions(frames, len(utterance.ids), self.stack)

    def pack(self, utterances: list[Utterance]) -> list[Batch]:
        """One-bin batches of whole utterances; those that no bin holds are left out."""
        lengths = np.asarray([self.length(u) for u in utterances], dtype=np.int64)
        fitting = np.flatnonzero(lengths <= self.positions)
        bins = pack(lengths, fitting, self.positions)
        return [self.batch([[utterances[i] for i in members]]) for members in bins]


class HeldOut:
    """One rank's share of a held-out split."""

    def __init__(self, held: list[HeldUtterance], layout: Layout, device: torch.device) -> None:
        self.held = held
        self._device = device
        usable = [h.utterance for h in held]
        self._batches = layout.pack(usable)
        # Everyone gets the audio of the next utterance: what the text alone would cost.
        exchanged = [
            replace(u, features=_audio_for(u, other))
            for u, other in zip(usable, usable[1:] + usable[:1], strict=True)
        ]
        self._exchanged = layout.pack(exchanged) if len(usable) > 1 else []

    def loss(self, model: OmniModel) -> dict[str, Any]:
        """Summed over ranks and divided: losses and accuracy per token, the gap in nats,
        and (tasks, 3) sums of tasks, see `LossSums`.
        """
        tasks = model.tasks
        true, exchanged = self._sums(model, self._batches), self._sums(model, self._exchanged)
        sums, other = all_sum(torch.stack((true, exchanged))).split(1)
        loss, tokens, correct, ctc, kl = sums[0, :_SUMS].tolist()
        tokens, other_tokens = max(tokens, 1e-9), max(float(other[0, 1]), 1e-9)
        by_task = sums[0, _SUMS:].view(tasks, 3)
        return {
            "loss": loss / tokens,
            "accuracy": correct / max(float(by_task[:, 1].sum()), 1.0),
            "gap": float(other[0, 0]) / other_tokens - loss / tokens,
            "ctc": ctc / tokens,
            "kl": kl / tokens,
            "tasks": by_task,
        }

    def _sums(self, model: OmniModel, batches: list[Batch]) -> Tensor:
        sums = torch.zeros(_SUMS + 3 * model.tasks, dtype=torch.float64)
        with torch.inference_mode():
            for batch in batches:
                out = model(batch.to(self._device))
                totals = torch.stack((out.loss, out.tokens, out.correct, out.ctc, out.kl))
                sums += torch.cat((totals.double(), out.tasks.double().flatten())).cpu()
        return sums

    def transcribe(
        self, model: OmniModel, template: Template, limit: int | None = None
    ) -> tuple[dict[str, Errors], list[dict[str, Any]]]:
        """Greedy transcripts of index rows below `limit`, on all ranks.

        Returns edit counts over all, short and long references, and the transcripts of all ranks
        in the order of the index.
        """
        chosen = [h for h in self.held if limit is None or h.utterance.number < limit]
        rows = transcribe(model, template, chosen)
        rows = sorted(all_gather(rows), key=lambda row: row["number"])
        return summarize(rows), rows


def _audio_for(utterance: Utterance, other: Utterance) -> list[Tensor]:
    """As many recordings as `utterance` has, but of `other`."""
    given = other.features or ()
    return [given[i % len(given)] for i in range(len(utterance.features or ()))]
