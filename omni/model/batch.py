"""A packed batch of fixed shape: the input of a training step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -1  # target of a position that is not supervised


@dataclass(frozen=True)
class Batch:
    """B bins of T positions; N audio positions over all bins, of width F = stack x frame width."""

    tokens_BT: Tensor
    """Token ids, int64."""
    targets_BT: Tensor
    """Ids of the next tokens, int64; `IGNORED` where a position is not supervised."""
    segments_BT: Tensor
    """Numbers of the utterances of a bin from 1, int64; 0 is padding."""
    audio_mask_BT: Tensor
    """True at audio positions."""
    audio_NF: Tensor
    """Stacked encoder frames in row-major order of the mask, bf16 or fp32."""
    audio_starts_N: Tensor
    """True where a recording begins."""
    tasks_BT: Tensor
    """Numbers of the tasks, int64."""
    teacher: Batch | None = None
    """The same utterances with the transcript in place of the audio, for distillation; it has as
    many supervised positions, in the same order."""

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to `device`; copies to a GPU are asynchronous."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if device.type == "cuda":  # Only pinned memory is copied asynchronously.
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in tensors.items()}
        if self.teacher is not None:
            moved["teacher"] = self.teacher.to(device)
        return replace(self, **moved)
