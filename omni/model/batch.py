"""What a worker's step sees: one packed batch of fixed shape."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORED = -1


@dataclass(frozen=True)
class Batch:
    """B bins of T positions. N audio positions over all bins, F = stack x d_model.

    tokens_BT, targets_BT (-1 = not supervised), segments_BT (which utterance; 0 = padding) are
    int64, audio_mask_BT is bool, audio_NF is bf16 or fp32, in row-major order of the mask.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor
    audio_mask_BT: Tensor
    audio_NF: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies to a GPU go on while the caller does."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        if device.type == "cuda":  # only pinned memory is copied in the background
            tensors = {name: t if t.is_cuda else t.pin_memory() for name, t in tensors.items()}
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in tensors.items()})
