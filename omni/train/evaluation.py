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
from omni.inference.decode_batch import HeldUtterance, summarize, transcribe
from omni.metrics.rows import DevLosses
from omni.metrics.score import Errors
from omni.metrics.sums import LossTotals, pack_losses, zero_losses
from omni.model.batch import Batch
from omni.model.chat_template import Template
from omni.model.decode import Decoding
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.plan.packing import pack
from omni.plan.sequences import sequence_positions
from omni.stream.collate import Utterance, collate
from omni.train.distributed import all_gather, all_sum


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
        # Pair each text with another utterance's audio: the loss that text alone explains.
        shuffled = [
            replace(u, features=_audio_for(u, other))
            for u, other in zip(usable, usable[1:] + usable[:1], strict=True)
        ]
        self._shuffled = layout.pack(shuffled) if len(usable) > 1 else []

    def loss(self, model: OmniModel) -> DevLosses:
        """Compute losses and accuracy per token and the shuffled-audio gap, over all ranks."""
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
    ) -> tuple[dict[str, Errors], list[dict[str, Any]]]:
        """Transcribe the index rows below `limit`. A collective call.

        Returns edit counts over all, short and long references, and the transcripts of all ranks
        in the order of the index.
        """
        chosen = [h for h in self.held if limit is None or h.utterance.number < limit]
        rows = transcribe(model, template, chosen, decoding)
        rows = sorted(all_gather(rows), key=lambda row: row["number"])
        return summarize(rows), rows


def _audio_for(utterance: Utterance, other: Utterance) -> list[Tensor]:
    """Return as many recordings as `utterance` has, taken from `other`."""
    given = other.features or ()
    return [given[i % len(given)] for i in range(len(utterance.features or ()))]
