"""Schemas and row types of the tables between the stages of the stream.

One row is one bin. Lists have one entry per utterance of the bin, and lists inside them one entry
per recording of the utterance.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TypedDict

import pyarrow as pa
import torch

from omni.stream.codec import FeatureCodec
from omni.stream.collate import Utterance

_SPAN = pa.struct(
    [
        ("start", pa.float64()),
        ("duration", pa.float64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
_COMMON = [
    ("split", pa.string()),
    ("bin", pa.int64()),
    ("numbers", pa.list_(pa.int64())),
    ("ids", pa.list_(pa.string())),
    ("uris", pa.list_(pa.string())),
    ("spans", pa.list_(_SPAN)),
    ("texts", pa.list_(pa.string())),
    ("languages", pa.list_(pa.string())),
    ("samples", pa.list_(pa.int64())),
    ("tokens", pa.list_(pa.list_(pa.int32()))),
    ("supervised", pa.list_(pa.list_(pa.bool_()))),
    ("transcript_tokens", pa.list_(pa.list_(pa.list_(pa.int32())))),
    ("tasks", pa.list_(pa.int32())),
    ("transcriptions", pa.list_(pa.bool_())),
    ("load_seconds", pa.float64()),
    ("errors", pa.list_(pa.string())),
    ("notes", pa.list_(pa.string())),
]
LOADED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("keys", pa.list_(pa.list_(pa.string()))),
        ("lengths", pa.list_(pa.list_(pa.int64()))),
        ("features", pa.list_(pa.list_(pa.large_binary()))),
        ("mels", pa.list_(pa.list_(pa.large_binary()))),
    ]
)
ENCODED_SCHEMA = pa.schema(
    [
        *_COMMON,
        ("frames", pa.list_(pa.list_(pa.int64()))),
        ("features", pa.large_binary()),
        ("encode_seconds", pa.float64()),
        ("encoded_samples", pa.int64()),
        ("cache_full", pa.string()),
        ("halvings", pa.int64()),
    ]
)


class Span(TypedDict):
    """Position of a recording in its file, with the names of the index."""

    start: float
    duration: float | None
    offset: int | None
    length: int | None


class BinRow(TypedDict):
    """Columns that both stages emit."""

    split: str
    bin: int
    numbers: list[int]
    """Rows of the index."""
    ids: list[str]
    uris: list[str]
    spans: list[Span]
    texts: list[str]
    languages: list[str | None]
    samples: list[int]
    """Samples at 16 kHz, summed over the recordings of an utterance."""
    tokens: list[list[int]]
    """Token ids, with AUDIO in the place of each recording."""
    supervised: list[list[bool]]
    transcript_tokens: list[list[list[int] | None] | None]
    """Token ids of what is said in each recording, where it is known; None if no loss needs it."""
    tasks: list[int | None]
    transcriptions: list[bool]
    """True where the answer is what is said in the only recording."""
    load_seconds: float
    """Seconds of reading, decoding and log-mels."""
    errors: list[str | None]
    """Reason and detail, on a line each, of a recording that cannot be used."""
    notes: list[str | None]
    """Kind and detail, on a line each, of a choice made in decoding a recording that is used."""


class LoadedRow(BinRow):
    """One bin with cached features, or with log-mels where the cache has none."""

    keys: list[list[str | None]]
    """Cache keys; None: augmented audio, which is never cached."""
    lengths: list[list[int]]
    """Samples at 16 kHz of each recording."""
    features: list[list[bytes | None]]
    """Features from the cache."""
    mels: list[list[bytes | None]]
    """Log-mels (n_mels, T_mel) of the recordings to encode."""


class EncodedRow(BinRow):
    """One bin with the features of its utterances."""

    frames: list[list[int]]
    """Frames of each recording; empty: the utterance was rejected."""
    features: bytes
    """Features of all recordings, one after another."""
    encode_seconds: float
    encoded_samples: int
    """Samples at 16 kHz that the encoder ran over; cached ones are not counted."""
    cache_full: str | None
    """Reason why the cache keeps nothing more."""
    halvings: int
    """Times that the encoder halved its batches for memory; of a block, in its first row."""


def utterances(row: EncodedRow, codec: FeatureCodec) -> list[Utterance]:
    """Cut one encoded row into its utterances; rejected ones have no features."""
    frames = list(chain(*row["frames"]))
    parts = iter(torch.split(codec.decode(row["features"]), frames))
    return [
        Utterance(
            features=list(islice(parts, len(of_utterance))) if of_utterance else None,
            ids=row["tokens"][i],
            supervised=row["supervised"][i],
            number=row["numbers"][i],
            task=row["tasks"][i] or 0,
            transcription=row["transcriptions"][i],
            transcript_tokens=row["transcript_tokens"][i],
        )
        for i, of_utterance in enumerate(row["frames"])
    ]
