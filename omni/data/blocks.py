"""The tables that travel between the stages of the stream."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from omni.data.codec import FeatureCodec
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
        ("mels", pa.list_(pa.large_binary())),  # (n_mels, T_mel) of what must be encoded
    ]
)
ENCODED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("frames", pa.list_(pa.int64())),  # 0: rejected
        ("features", pa.large_binary()),  # all utterances', one after another
        ("encode_seconds", pa.float64()),
        ("encoded_samples", pa.int64()),
        ("cache_full", pa.string()),  # why the cache keeps nothing more, else null
    ]
)


def utterances(row: dict[str, Any], codec: FeatureCodec) -> list[Utterance]:
    """The utterances of one encoded row; rejected ones have no features."""
    features = codec.decode(row["features"])
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
