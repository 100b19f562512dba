"""Evaluate during training: loss, accuracy, shuffled-audio gap and WER, over all ranks.

Each rank keeps its share of the dev and test utterances in memory, so that an evaluation reads and
encodes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.config import Config
from omni.inference.choices import add_choice_scores
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
from omni.stream.collate import Utterance, collate
from omni.train.distributed import all_gather, all_sum
from omni.train.lockstep import in_step
from omni.train.other_audio import with_other_audio


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
        return self._length(utterance, [len(part) for part in utterance.features or ()])

    def fits(self, utterance: Utterance, frames: Sequence[int]) -> bool:
        """Tell whether an utterance fits into a bin with recordings of so many frames."""
        return self._length(utterance, frames) <= self.positions

    def _length(self, utterance: Utterance, frames: Sequence[int]) -> int:
        return sequence_positions(frames, len(utterance.ids), self.stack, self.summary_tokens)

    def pack(self, utterances: list[Utterance]) -> list[Batch]:
        """Pack utterances into batches of one bin; leave out those longer than a bin."""
        lengths = np.asarray([self.length(u) for u in utterances], dtype=np.int64)
        fitting = np.flatnonzero(lengths <= self.positions)
        bins = pack(lengths, fitting, self.positions)
        return [self.batch([[utterances[i] for i in members]]) for members in bins]


class HeldOut:
    """One rank's share of a held-out split, in memory.

    places: number of the bin of each utterance, and its number in that bin. Making it is a
    collective call.
    """

    def __init__(
        self,
        held: list[HeldUtterance],
        places: Sequence[tuple[int, int]],
        layout: Layout,
        device: torch.device,
    ) -> None:
        self.held = held
        self._device = device
        shuffled = with_other_audio(held, places, layout.fits)
        paired = [h.utterance for h, other in zip(held, shuffled, strict=True) if other is not None]
        alone = [h.utterance for h, other in zip(held, shuffled, strict=True) if other is None]
        self._paired, self._alone = layout.pack(paired), layout.pack(alone)
        self._shuffled = layout.pack([other for other in shuffled if other is not None])

    def loss(self, model: OmniModel) -> DevLosses:
        """Compute losses and accuracy per token and the shuffled-audio gap, over all ranks."""
        with in_step(model):
            parts = self._paired, self._alone, self._shuffled
            sums = torch.stack([self._sums(model, batches) for batches in parts])
        # Behind the block, in which other ranks may still run the model.
        paired, alone, shuffled = all_sum(sums)
        return DevLosses.of(
            LossTotals.of_losses(paired + alone),
            LossTotals.of_losses(paired),
            LossTotals.of_losses(shuffled),
        )

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
