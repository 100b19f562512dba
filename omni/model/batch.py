"""A packed batch of fixed shape: the input of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni.model.packed_attention import SegmentLayout

IGNORED = -1  # target of a position that is not supervised


@dataclass(frozen=True)
class CTCLabels:
    """CTC labels of U recordings of a batch; lengths are on the host, so no GPU is waited for."""

    rows_N: Tensor | None
    """Numbers of the soft tokens of these recordings, int64; None: all of the batch."""
    soft_lengths: tuple[int, ...]
    """Soft tokens of each recording."""
    lengths: tuple[int, ...]
    """Tokens of each transcript."""
    tokens_L: Tensor
    """Token ids of the transcripts, one after another, int64."""
    classes_K: Tensor
    """The different ones among them, ascending."""
    class_L: Tensor
    """For each token id its place in `classes_K`."""

    @classmethod
    def of(
        cls, soft_lengths: Sequence[int], transcripts: Sequence[Sequence[int] | None]
    ) -> CTCLabels:
        """soft_lengths, transcripts: of all recordings of a batch; None: not known."""
        said = [text is not None for text in transcripts]
        texts = [np.asarray(text, dtype=np.int64) for text in transcripts if text is not None]
        tokens = np.concatenate([np.zeros(0, np.int64), *texts])
        classes, indices = np.unique(tokens, return_inverse=True)
        rows = np.flatnonzero(np.repeat(np.asarray(said, dtype=bool), soft_lengths))
        return cls(
            None if all(said) else torch.from_numpy(rows),
            tuple(n for n, has in zip(soft_lengths, said, strict=True) if has),
            tuple(map(len, texts)),
            torch.from_numpy(tokens),
            torch.from_numpy(classes),
            torch.from_numpy(indices.reshape(-1)),
        )


@dataclass(frozen=True)
class Batch:
    """B bins of T positions; N stacks of frames over all bins, of width F = stack x frame width."""

    tokens_BT: Tensor
    """Token ids, int64."""
    targets_BT: Tensor
    """Ids of the next tokens, int64; `IGNORED` where a position is not supervised."""
    segments_BT: Tensor
    """Numbers of the utterances of a bin from 1, int64; 0 is padding."""
    audio_mask_BT: Tensor
    """True at the positions of soft tokens."""
    audio_NF: Tensor
    """Stacked encoder frames in the order of their positions, bf16 or fp32."""
    audio_at_N: Tensor
    """Positions of the frames' soft tokens, counted through the rows, int64."""
    supervised_S: Tensor
    """Supervised positions, counted through the rows, int64."""
    audio_starts_N: Tensor
    """True where a recording begins."""
    summary_at_M: Tensor
    """Positions of the recordings' summary tokens, counted through the rows, int64."""
    tasks_BT: Tensor
    """Numbers of the tasks, int64."""
    ctc: CTCLabels | None = None
    """Transcripts of the recordings; None without CTC."""
    teacher: Batch | None = None
    """The same utterances with the transcript in place of the audio, for distillation; it has as
    many supervised positions, in the same order."""

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to `device`; copies to a GPU are asynchronous."""
        moved: Batch = _moved(self, device)
        return moved

    def layout(self) -> SegmentLayout:
        """Lay out the rows for the attention kernel of the batch's device."""
        return SegmentLayout.packed(self.segments_BT)


def _moved(item: Any, device: torch.device) -> Any:
    """Copy the tensors of a `Batch` or of `CTCLabels`."""
    moved: dict[str, Any] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        if isinstance(value, Tensor):
            # Only pinned memory is copied asynchronously.
            pinned = value if device.type != "cuda" or value.is_cuda else value.pin_memory()
            moved[field.name] = pinned.to(device, non_blocking=True)
        elif isinstance(value, Batch | CTCLabels):
            moved[field.name] = _moved(value, device)
    return replace(item, **moved)
