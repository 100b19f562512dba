"""Features travel through Arrow tables as bytes and come out to the last bit."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from omni.data.blocks import ENCODED_SCHEMA, LOADED_SCHEMA, utterances
from omni.data.codec import FeatureCodec

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
        "prompt_ids": [[1, n] for n in numbers],
        "text_ids": [[n, n + 1] for n in numbers],
        "errors": [None if f is not None else "missing\nno such file" for f in features],
        "frames": [0 if f is None else len(f) for f in features],
        "features": b"".join(CODEC.encode(f) for f in features if f is not None),
        "encode_seconds": 0.5,
        "encoded_samples": 16_000 * count,
        "cache_full": None,
        **changes,
    }
    [travelled] = pa.Table.from_pylist([row], ENCODED_SCHEMA).to_pylist()
    return travelled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_gives_back_its_utterances(dtype: torch.dtype) -> None:
    features: list[Tensor | None] = [_features(n, dtype, seed=n) for n in (3, 1, 7)]
    members = utterances(_row(features), FeatureCodec(WIDTH, dtype))
    assert [m.number for m in members] == [100, 101, 102]
    assert [list(m.prompt_ids) for m in members] == [[1, 100], [1, 101], [1, 102]]
    assert [list(m.text_ids) for m in members] == [[100, 101], [101, 102], [102, 103]]
    for member, expected in zip(members, features, strict=True):
        assert member.features_TF is not None and expected is not None
        assert _bits(member.features_TF) == _bits(expected)


@pytest.mark.parametrize("rejected", [0, 1, 2])
def test_a_rejected_utterance_keeps_its_place_without_features(rejected: int) -> None:
    features: list[Tensor | None] = [_features(n, torch.bfloat16, seed=n) for n in (3, 1, 7)]
    features[rejected] = None
    members = utterances(_row(features), CODEC)
    assert [m.number for m in members] == [100, 101, 102]
    for member, expected in zip(members, features, strict=True):
        if expected is None:
            assert member.features_TF is None
        else:
            assert member.features_TF is not None
            assert _bits(member.features_TF) == _bits(expected)


def test_a_row_may_hold_only_rejected_utterances_or_none() -> None:
    members = utterances(_row([None, None]), CODEC)
    assert [m.features_TF for m in members] == [None, None]
    assert utterances(_row([]), CODEC) == []


def test_a_missing_prompt_is_an_empty_one() -> None:
    row = _row([_features(2, torch.bfloat16)], prompt_ids=[None])
    assert list(utterances(row, CODEC)[0].prompt_ids) == []


def test_both_stages_speak_of_utterances_alike() -> None:
    """The encode stage hands on, unchanged, what the load stage said of a bin."""
    encoded = {"frames", "features", "encode_seconds", "encoded_samples", "cache_full"}
    handed_on = [name for name in ENCODED_SCHEMA.names if name not in encoded]
    assert [LOADED_SCHEMA.field(n) for n in handed_on] == [
        ENCODED_SCHEMA.field(n) for n in handed_on
    ]
    assert {"numbers", "texts", "errors", "prompt_ids", "text_ids"} <= set(handed_on)
