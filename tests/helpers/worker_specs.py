"""Facts of a small run for tests of single ranks, and blocks of its stream with random features."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from omni.audio.windows import encoder_frames
from omni.config import parse_config
from omni.plan.plan import Split
from omni.run.prepare import Prepared, prepare
from omni.stream.schema import ENCODED_SCHEMA


@functools.cache
def small_run() -> Prepared:
    """A prepared run over the embedded corpus: 4 bins a step, 2 bins a block."""
    return prepare(
        parse_config(
            {
                "run": {"storage": tempfile.mkdtemp(prefix="omni-test-")},
                "data": {"train": ["embedded:dev"], "dev": ["embedded:test"], "cache": None},
                "tokenizer": {"vocab_size": 300},
                "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
                "optim": {
                    "bin_positions": 256,
                    "bins_per_step": 4,
                    "bins_per_block": 2,
                    "steps": 6,
                },
                "train": {"precision": "fp32"},
            }
        )
    )


def encoded_block(
    prepared: Prepared, split: Split, bins: Sequence[int], /, **changes: Any
) -> pa.Table:
    """A block of the stream as the encode stage makes it. changes: of the first row's columns."""
    codec = prepared.encoder.codec
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in bins:
        held = split.of_bin(number)
        members = held.members(number)
        table = held.table.take(pa.array(members.rows))
        mode = prepared.config.encoder.mode
        frames = [[encoder_frames(n, mode)] for n in table["samples"].to_pylist()]
        features = [torch.randn(n, codec.feature_dim, generator=generator) for [n] in frames]
        nothing = [None] * len(frames)
        rows.append(
            {
                "split": split.name,
                "bin": number,
                "numbers": members.numbers.tolist(),
                "ids": table["id"].to_pylist(),
                "uris": table["uri"].to_pylist(),
                "spans": table.select(["start", "duration", "offset", "length"]).to_pylist(),
                "texts": table["text"].to_pylist(),
                "languages": nothing,
                "samples": table["samples"].to_pylist(),
                "tokens": table["tokens"].to_pylist(),
                "supervised": table["supervised"].to_pylist(),
                "transcript_tokens": nothing,
                "tasks": table["task_number"].to_pylist(),
                "transcriptions": [True] * len(frames),
                "errors": nothing,
                "load_seconds": 0.25,
                "frames": frames,
                "features": b"".join(codec.encode(f.to(codec.dtype)) for f in features),
                "encode_seconds": 0.5,
                "encoded_samples": 16_000,
                "cache_full": None,
                "halvings": 0,
            }
        )
    rows[0] |= changes
    return pa.Table.from_pylist(rows, ENCODED_SCHEMA)
