"""Make encoded blocks, as trainers read them, of loaded rows and the features that these lacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import pyarrow as pa

from omni.stream.schema import ENCODED_SCHEMA, EncodedRow, LoadedRow
from omni.stream.stream_settings import StreamSettings

Name: TypeAlias = str | tuple[int, int, int]
"""Name of a recording inside a block: a content key, or its row, utterance and recording numbers
where the audio is augmented."""


def recording_names(number: int, row: LoadedRow) -> list[list[Name]]:
    """Name each recording of row `number` of a block."""
    return [
        [(number, i, part) if key is None else key for part, key in enumerate(keys)]
        for i, keys in enumerate(row["keys"])
    ]


def encoded_block(
    rows: Sequence[LoadedRow],
    settings: StreamSettings,
    encoded: Mapping[Name, bytes],
    seconds: float = 0.0,
    samples: int = 0,
    cache_full: str | None = None,
    halvings: int = 0,
) -> pa.Table:
    """Make a table of `ENCODED_SCHEMA`, row by row.

    encoded: features that the rows lack. seconds, samples: of encoding them. cache_full: reason why
    the cache keeps nothing more. halvings: times that the encoder had to halve its batches.
    """
    done: list[EncodedRow] = []
    for number, row in enumerate(rows):
        parts = [
            [
                cached if cached is not None else encoded.get(name)
                for cached, name in zip(features, of_row, strict=True)
            ]
            for features, of_row in zip(row["features"], recording_names(number, row), strict=True)
        ]
        # An utterance that lacks a recording is left out as a whole.
        complete = [[p for p in of_row if p is not None and None not in of_row] for of_row in parts]
        done.append(
            {
                "split": row["split"],
                "bin": row["bin"],
                "numbers": row["numbers"],
                "ids": row["ids"],
                "uris": row["uris"],
                "spans": row["spans"],
                "texts": row["texts"],
                "languages": row["languages"],
                "samples": row["samples"],
                "tokens": row["tokens"],
                "supervised": row["supervised"],
                "transcript_tokens": row["transcript_tokens"],
                "tasks": row["tasks"],
                "transcriptions": row["transcriptions"],
                "load_seconds": row["load_seconds"],
                "errors": row["errors"],
                "notes": row["notes"],
                "frames": [[settings.codec.frames(p) for p in of_row] for of_row in complete],
                "features": b"".join(chain(*complete)) if settings.keep_features else b"",
                "encode_seconds": seconds / len(rows),
                "encoded_samples": samples // len(rows),
                "cache_full": cache_full,
                "halvings": 0 if done else halvings,
            }
        )
    return pa.Table.from_pylist(done, ENCODED_SCHEMA)
