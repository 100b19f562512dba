"""The tables that travel between the stages of the stream."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import pyarrow as pa

from omni.stream.codec import FeatureCodec
from omni.stream.collate import Utterance

# One row is one bin; lists have one entry per utterance of the bin, and lists in them one per
# recording of the utterance.
_COMMON = [
    ("split", pa.string()),
    ("bin", pa.int64()),
    ("numbers", pa.list_(pa.int64())),  # rows of the index
    ("ids", pa.list_(pa.string())),
    ("uris", pa.list_(pa.string())),
    ("texts", pa.list_(pa.string())),
    ("languages", pa.list_(pa.string())),
    ("samples", pa.list_(pa.int64())),  # at 16 kHz, of all its recordings
    ("tokens", pa.list_(pa.list_(pa.int32()))),  # with AUDIO for each recording
    ("supervised", pa.list_(pa.list_(pa.bool_()))),
    ("heard", pa.list_(pa.list_(pa.list_(pa.int32())))),  # ids of what is said, or null
    ("tasks", pa.list_(pa.int32())),
    ("load_seconds", pa.float64()),  # reading, decoding, log-mels
    ("errors", pa.list_(pa.string())),  # "reason\ndetail" of an unusable recording, else null
]
LOADED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("keys", pa.list_(pa.list_(pa.string()))),  # null: augmented, nothing for the cache
        ("lengths", pa.list_(pa.list_(pa.int64()))),  # samples at 16 kHz
        ("features", pa.list_(pa.list_(pa.large_binary()))),  # from the cache, else null
        ("mels", pa.list_(pa.list_(pa.large_binary()))),  # (n_mels, T_mel) of what must be encoded
    ]
)
ENCODED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("frames", pa.list_(pa.list_(pa.int64()))),  # none: rejected
        ("features", pa.large_binary()),  # all utterances', one after another
        ("encode_seconds", pa.float64()),
        ("encoded_samples", pa.int64()),
        ("cache_full", pa.string()),  # why the cache keeps nothing more, else null
    ]
)


def utterances(row: dict[str, Any], codec: FeatureCodec) -> list[Utterance]:
    """The utterances of one encoded row; rejected ones have no features."""
    parts = iter(codec.decode(row["features"]).split(list(chain(*row["frames"]))))
    return [
        Utterance(
            features=list(islice(parts, len(frames))) if frames else None,
            ids=row["tokens"][i],
            supervised=row["supervised"][i],
            number=row["numbers"][i],
            task=row["tasks"][i] or 0,
            heard=row["heard"][i],
        )
        for i, frames in enumerate(row["frames"])
    ]
