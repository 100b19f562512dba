"""What a worker's step sees: one packed batch of fixed shape."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -1


@dataclass(frozen=True)
class Batch:
    """B bins of T positions. N audio positions over all bins, F = stack x d_model.

    tokens_BT, targets_BT (-1 = not supervised), segments_BT (which utterance; 0 = padding) are
    int64, audio_mask_BT is bool, audio_NF is bf16 or fp32, in row-major order of the mask;
    audio_starts_N is True where a recording begins. tasks_BT are numbers of tasks, int64.
    teacher: the same utterances with the transcript in the place of the audio, for distillation; as
    many supervised positions in the same order.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor
    audio_mask_BT: Tensor
    audio_NF: Tensor
    audio_starts_N: Tensor
    tasks_BT: Tensor
    teacher: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies to a GPU go on while the caller does."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if device.type == "cuda":  # only pinned memory is copied in the background
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in tensors.items()}
        if self.teacher is not None:
            moved["teacher"] = self.teacher.to(device)
        return replace(self, **moved)
