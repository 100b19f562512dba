"""Convert encoder features to bytes and back, for the stream and the feature cache.

Arrow and numpy have no bfloat16, so features travel as raw bytes, one frame after another. `exact`
keeps every bit; `int8` keeps one byte per channel and one scale per frame, half of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Format = Literal["exact", "int8"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SCALE_BYTES = 4  # one fp32 number per frame
_SMALLEST_SCALE = 1e-30  # a frame of zeros would be divided by zero

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class FeatureCodec:
    """Encode (T, feature_dim) features in bf16 or fp32 as bytes, and decode them.

    `int8` is symmetric: a frame's largest magnitude becomes 127, so a channel is off by at most
    1/254 of it. Bytes of several utterances can be joined, and decoded together.
    """

    feature_dim: int
    dtype: torch.dtype = torch.bfloat16
    format: Format = "exact"

    @property
    def frame_bytes(self) -> int:
        """Bytes of one encoded frame."""
        if self.format == "int8":
            return _SCALE_BYTES + self.feature_dim
        return self.dtype.itemsize * self.feature_dim

    def encode(self, features_TF: Tensor) -> bytes:
        if self.format == "exact":
            return tensor_bytes(features_TF)
        values = features_TF.detach().cpu().float()
        scales_T1 = values.abs().amax(dim=1, keepdim=True) / 127.0
        levels = (values / scales_T1.clamp(min=_SMALLEST_SCALE)).round_().to(torch.int8)
        packed = np.empty((len(values), self.frame_bytes), dtype=np.uint8)
        packed[:, :_SCALE_BYTES] = scales_T1.numpy().view(np.uint8)
        packed[:, _SCALE_BYTES:] = levels.numpy().view(np.uint8)
        return packed.tobytes()

    def decode(self, data: Buffer) -> Tensor:
        """Decode to (T, feature_dim) in `dtype`."""
        if self.format == "exact":
            return tensor_from(data, self.dtype).view(-1, self.feature_dim)
        packed = np.frombuffer(data, np.uint8).reshape(-1, self.frame_bytes)
        scales = torch.from_numpy(packed[:, :_SCALE_BYTES].copy().view(np.float32))
        levels = torch.from_numpy(packed[:, _SCALE_BYTES:].copy().view(np.int8))
        return (levels.float() * scales).to(self.dtype)

    def frames(self, data: bytes) -> int:
        """Count the frames in encoded features."""
        return len(data) // self.frame_bytes

    def roundtrip(self, features_TF: Tensor) -> Tensor:
        """Encode and decode, so that inference sees the features that training saw."""
        if self.format == "exact":
            return features_TF
        return self.decode(self.encode(features_TF)).to(features_TF.device)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Copy the raw bytes of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def tensor_from(data: Buffer, dtype: torch.dtype) -> Tensor:
    """Read bytes as a flat bf16 or fp32 tensor; a copy, since torch needs writable memory."""
    width = np.int16 if dtype == torch.bfloat16 else np.int32
    return torch.from_numpy(np.frombuffer(data, width).copy()).view(dtype)
