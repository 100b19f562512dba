"""Evaluate during training: loss, accuracy, shuffled-audio gap and WER, over all ranks.

Each rank keeps its share of the dev and test utterances in memory, so that an evaluation reads and
encodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.config import Config
from omni.inference.choices import add_choice_scores, another_recording, audio_for
from omni.inference.decode_batch import HeldUtterance, summarize, transcribe
from omni.metrics.rows import DevLosses
from omni.metrics.score import Errors
from omni.metrics.sums import LossTotals, pack_losses, zero_losses
from omni.metrics.task_scores import Scoring, spoken
from omni.model.batch import Batch
from omni.model.chat_template import Template
from omni.model.decode import Decoding
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.plan.packing import pack
from omni.plan.sequences import sequence_positions
from omni.storage.digest import digest
from omni.stream.collate import Utterance, collate
from omni.train.distributed import all_gather, all_sum
from omni.train.lockstep import in_step


@dataclass(frozen=True)
class Layout:
    """Shape of the batches that utterances are packed into."""

    positions: int
    stack: int
    summary_tokens: int
    frame_dim: int
    teacher: bool = False
    ctc: bool = False

    @classmethod
    def of(cls, config: Config, model: OmniConfig) -> Layout:
        teacher = config.optim.kl_weight > 0
        return cls(
            config.optim.bin_positions,
            model.stack,
            model.summary_tokens,
            model.frame_dim,
            teacher,
            model.ctc,
        )

    def batch(self, bins: list[list[Utterance]]) -> Batch:
        return collate(
            bins,
            positions=self.positions,
            stack=self.stack,
            frame_dim=self.frame_dim,
            summary_tokens=self.summary_tokens,
            teacher=self.teacher,
            ctc=self.ctc,
        )

    def length(self, utterance: Utterance) -> int:
        """Return the positions that an utterance takes in a bin."""
        frames = [len(part) for part in utterance.features or ()]
        return sequence_positions(frames, len(utterance.ids), self.stack, self.summary_tokens)

    def pack(self, utterances: list[Utterance]) -> list[Batch]:
        """Pack utterances into batches of one bin; leave out those longer than a bin."""
        lengths = np.asarray([self.length(u) for u in utterances], dtype=np.int64)
        fitting = np.flatnonzero(lengths <= self.positions)
        bins = pack(lengths, fitting, self.positions)
        return [self.batch([[utterances[i] for i in members]]) for members in bins]


class HeldOut:
    """One rank's share of a held-out split, in memory."""

    def __init__(self, held: list[HeldUtterance], layout: Layout, device: torch.device) -> None:
        self.held = held
        self._device = device
        usable = [h.utterance for h in held]
        self._batches = layout.pack(usable)
        # Pair each text with another recording: the loss that text alone explains.
        order = _shuffled_order(held)
        others = another_recording([held[i].recording for i in order])
        shuffled = [
            replace(usable[i], features=audio_for(usable[i], usable[order[other]]))
            for i, other in zip(order, others, strict=True)
            if other is not None
        ]
        self._shuffled = layout.pack(shuffled)

    def loss(self, model: OmniModel) -> DevLosses:
        """Compute losses and accuracy per token and the shuffled-audio gap, over all ranks."""
        with in_step(model):
            sums = torch.stack([self._sums(model, b) for b in (self._batches, self._shuffled)])
        return DevLosses.of(*(LossTotals.of_losses(packed) for packed in all_sum(sums)))

    def _sums(self, model: OmniModel, batches: list[Batch]) -> Tensor:
        """Add up the losses of this rank's batches, as `pack_losses` packs them."""
        sums = zero_losses(model.tasks)
        with torch.inference_mode():
            for batch in batches:
                sums += pack_losses(model(batch.to(self._device))).cpu()
        return sums

    def transcribe(
        self,
        model: OmniModel,
        template: Template,
        decoding: Decoding,
        limit: int | None = None,
        scoring: Scoring | None = None,
    ) -> tuple[dict[str, Errors], list[dict[str, Any]]]:
        """Transcribe the index rows below `limit`, and score the choices of closed tasks.

        A collective call. Returns edit counts over all, short and long references of the tasks
        whose answer is what is said, and the transcripts of all ranks in the order of the index.
        """
        chosen = [h for h in self.held if limit is None or h.utterance.number < limit]
        with in_step(model):
            rows = transcribe(model, template, chosen, decoding)
            if scoring is not None and scoring.named:
                for row, held in zip(rows, chosen, strict=True):
                    scoring.label(row, scoring.names[held.utterance.task])
                add_choice_scores(
                    rows,
                    [h.utterance for h in chosen],
                    [h.recording for h in chosen],
                    scoring.closed,
                    model,
                    template,
                )
        rows = sorted(all_gather(rows), key=lambda row: row["number"])
        return summarize(spoken(rows)), rows


def _shuffled_order(held: list[HeldUtterance]) -> list[int]:
    """Order the utterances in which each is paired with the next one.

    Those of a bin may be alike, such as in length, which a task may be about: where several tasks
    share recordings the order is random.
    """
    names = [h.recording for h in held]
    if len(set(names)) == len(names):
        return list(range(len(held)))
    return sorted(range(len(held)), key=lambda i: digest(f"{names[i]} {held[i].id}"))
