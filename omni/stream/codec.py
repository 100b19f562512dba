"""Features as bytes: how they travel between stages and lie in the cache.

Arrow and numpy have no bfloat16, so features travel as raw bytes, one frame after another. `exact`
keeps every bit; `int8` keeps one byte per channel and one scale per frame, half of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Format = Literal["exact", "int8"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SCALE_BYTES = 4  # fp32


@dataclass(frozen=True)
class FeatureCodec:
    """Bytes of (T, d_model) features in bf16 or fp32, and back.

    `int8` is symmetric: a frame's largest magnitude becomes 127, so a channel is off by at most
    1/254 of it. Bytes of several utterances can be joined, and decoded together.
    """

    d_model: int
    dtype: torch.dtype = torch.bfloat16
    format: Format = "exact"

    @classmethod
    def of(cls, encoder: dict[str, Any]) -> FeatureCodec:
        """The codec of a run, from the facts about its encoder that every checkpoint keeps."""
        width = encoder["d_model"] * max(1, len(encoder.get("layers") or ()))
        return cls(width, DTYPES[encoder["dtype"]], encoder.get("format", "exact"))

    @property
    def frame_bytes(self) -> int:
        if self.format == "int8":
            return _SCALE_BYTES + self.d_model
        return self.dtype.itemsize * self.d_model

    def encode(self, features_TF: Tensor) -> bytes:
        if self.format == "exact":
            return tensor_bytes(features_TF)
        values = features_TF.detach().cpu().float()
        scales_T1 = values.abs().amax(dim=1, keepdim=True) / 127.0
        levels = (values / scales_T1.clamp(min=1e-30)).round_().to(torch.int8)
        packed = np.empty((len(values), self.frame_bytes), dtype=np.uint8)
        packed[:, :_SCALE_BYTES] = scales_T1.numpy().view(np.uint8)
        packed[:, _SCALE_BYTES:] = levels.numpy().view(np.uint8)
        return packed.tobytes()

    def decode(self, data: Any) -> Tensor:
        """(T, d_model) in `dtype`."""
        if self.format == "exact":
            return tensor_from(data, self.dtype).view(-1, self.d_model)
        packed = np.frombuffer(data, np.uint8).reshape(-1, self.frame_bytes)
        scales = torch.from_numpy(packed[:, :_SCALE_BYTES].copy().view(np.float32))
        levels = torch.from_numpy(packed[:, _SCALE_BYTES:].copy().view(np.int8))
        return (levels.float() * scales).to(self.dtype)

    def frames(self, data: bytes) -> int:
        return len(data) // self.frame_bytes

    def as_travelled(self, features_TF: Tensor) -> Tensor:
        """What the trainer would get of these features: itself, but for rounding."""
        if self.format == "exact":
            return features_TF
        return self.decode(self.encode(features_TF)).to(features_TF.device)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Raw bytes of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def tensor_from(data: Any, dtype: torch.dtype) -> Tensor:
    """Bytes as a flat bf16 or fp32 tensor; a copy, since torch wants memory that it may write."""
    width = np.int16 if dtype == torch.bfloat16 else np.int32
    return torch.from_numpy(np.frombuffer(data, width).copy()).view(dtype)
