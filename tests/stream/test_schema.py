"""Features travel through Arrow tables as bytes and come out to the last bit."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from omni.model.chat_template import AUDIO
from omni.stream.codec import FeatureCodec
from omni.stream.schema import ENCODED_SCHEMA, LOADED_SCHEMA, utterances

WIDTH = 6
CODEC = FeatureCodec(WIDTH)


def _features(frames: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, WIDTH, generator=generator).to(dtype)


def _bits(tensor: Tensor) -> list[list[int]]:
    return tensor.contiguous().view(torch.uint8).tolist()


def _row(features: list[Tensor | None], **changes: Any) -> dict[str, Any]:
    """A row as the encode stage makes it, after a journey through an Arrow table."""
    count = len(features)
    numbers = list(range(100, 100 + count))
    row = {
        "split": "train",
        "bin": 4,
        "numbers": numbers,
        "ids": [f"id-{n}" for n in numbers],
        "uris": [f"{n}.wav" for n in numbers],
        "texts": [f"text {n}" for n in numbers],
        "languages": [None for _ in numbers],
        "samples": [16_000 for _ in numbers],
        "tokens": [[AUDIO, 1, n] for n in numbers],
        "supervised": [[False, False, True] for _ in numbers],
        "transcript_tokens": [None for _ in numbers],
        "tasks": [n % 2 for n in numbers],
        "transcriptions": [n % 3 == 0 for n in numbers],
        "errors": [None if f is not None else "missing\nno such file" for f in features],
        "frames": [[] if f is None else [len(f)] for f in features],
        "features": b"".join(CODEC.encode(f) for f in features if f is not None),
        "encode_seconds": 0.5,
        "encoded_samples": 16_000 * count,
        "cache_full": None,
        "halvings": 0,
        **changes,
    }
    [travelled] = pa.Table.from_pylist([row], ENCODED_SCHEMA).to_pylist()
    return travelled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_gives_back_its_utterances(dtype: torch.dtype) -> None:
    features: list[Tensor | None] = [_features(n, dtype, seed=n) for n in (3, 1, 7)]
    members = utterances(_row(features), FeatureCodec(WIDTH, dtype))
    assert [m.number for m in members] == [100, 101, 102]
    assert [list(m.ids) for m in members] == [[AUDIO, 1, 100], [AUDIO, 1, 101], [AUDIO, 1, 102]]
    assert [list(m.supervised) for m in members] == [[False, False, True]] * 3
    assert [m.task for m in members] == [0, 1, 0]
    assert [m.transcription for m in members] == [False, False, True]
    for member, expected in zip(members, features, strict=True):
        assert member.features is not None and expected is not None
        assert [_bits(part) for part in member.features] == [_bits(expected)]


@pytest.mark.parametrize("rejected", [0, 1, 2])
def test_a_rejected_utterance_keeps_its_place_without_features(rejected: int) -> None:
    features: list[Tensor | None] = [_features(n, torch.bfloat16, seed=n) for n in (3, 1, 7)]
    features[rejected] = None
    members = utterances(_row(features), CODEC)
    assert [m.number for m in members] == [100, 101, 102]
    for member, expected in zip(members, features, strict=True):
        if expected is None:
            assert member.features is None
        else:
            assert member.features is not None
            assert [_bits(part) for part in member.features] == [_bits(expected)]


def test_recordings_of_a_conversation_stay_together() -> None:
    parts = [_features(n, torch.bfloat16, seed=n) for n in (3, 1, 7)]
    row = _row([parts[0], None, parts[2]])
    row |= {"frames": [[3, 1], [], [7]], "features": b"".join(CODEC.encode(p) for p in parts)}
    first, rejected, last = utterances(row, CODEC)
    assert first.features is not None and last.features is not None
    assert [_bits(p) for p in first.features] == [_bits(p) for p in parts[:2]]
    assert rejected.features is None
    assert [_bits(p) for p in last.features] == [_bits(parts[2])]


def test_a_row_may_hold_only_rejected_utterances_or_none() -> None:
    members = utterances(_row([None, None]), CODEC)
    assert [m.features for m in members] == [None, None]
    assert utterances(_row([]), CODEC) == []


def test_both_stages_speak_of_utterances_alike() -> None:
    """The encode stage hands on, unchanged, what the load stage said of a bin."""
    encoded = {"frames", "features", "encode_seconds", "encoded_samples", "cache_full", "halvings"}
    handed_on = [name for name in ENCODED_SCHEMA.names if name not in encoded]
    assert [LOADED_SCHEMA.field(n) for n in handed_on] == [
        ENCODED_SCHEMA.field(n) for n in handed_on
    ]
    assert {"numbers", "texts", "errors", "tokens", "supervised", "transcript_tokens"} <= set(
        handed_on
    )
