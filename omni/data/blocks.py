"""The tables that travel between the stages of the stream, and features as bytes in them.

Arrow and numpy have no bfloat16: features travel as raw bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from omni.data.collate import Utterance

# One row is one bin; lists have one entry per utterance of the bin.
_COMMON = [
    ("split", pa.string()),
    ("bin", pa.int64()),
    ("numbers", pa.list_(pa.int64())),  # rows of the index
    ("ids", pa.list_(pa.string())),
    ("uris", pa.list_(pa.string())),
    ("texts", pa.list_(pa.string())),
    ("languages", pa.list_(pa.string())),
    ("samples", pa.list_(pa.int64())),  # at 16 kHz
    ("prompt_ids", pa.list_(pa.list_(pa.int32()))),
    ("text_ids", pa.list_(pa.list_(pa.int32()))),
    ("errors", pa.list_(pa.string())),  # "reason\ndetail" of an unusable recording, else null
]
LOADED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("keys", pa.list_(pa.string())),
        ("features", pa.list_(pa.large_binary())),  # from the cache, else null
        ("mels", pa.list_(pa.large_binary())),  # fp32 (n_mels, T_mel) of what must be encoded
    ]
)
ENCODED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("frames", pa.list_(pa.int64())),  # 0: rejected
        ("features", pa.large_binary()),  # all utterances', one after another
        ("encode_seconds", pa.float64()),
        ("encoded_samples", pa.int64()),
    ]
)


def feature_bytes(features_TF: Tensor) -> bytes:
    """Raw bytes of bf16 or fp32 features (T, d_model)."""
    contiguous = features_TF.cpu().contiguous()
    return contiguous.view(torch.uint8).numpy().tobytes()


def features_from(data: Any, dtype: torch.dtype, d_model: int) -> Tensor:
    """(T, d_model) from raw bytes; a copy, since torch wants memory that it may write."""
    width = np.int16 if dtype == torch.bfloat16 else np.int32
    return torch.from_numpy(np.frombuffer(data, width).copy()).view(dtype).view(-1, d_model)


def utterances(row: dict[str, Any], dtype: torch.dtype, d_model: int) -> list[Utterance]:
    """The utterances of one encoded row; rejected ones have no features."""
    features = features_from(row["features"], dtype, d_model)
    parts = features.split(row["frames"]) if row["frames"] else ()
    return [
        Utterance(
            features_TF=part if frames else None,
            prompt_ids=row["prompt_ids"][i] or (),
            text_ids=row["text_ids"][i],
            number=row["numbers"][i],
        )
        for i, (part, frames) in enumerate(zip(parts, row["frames"], strict=True))
    ]
