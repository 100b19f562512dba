"""Features travel as bytes: exact ones to the last bit, compact ones within their promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni.stream.codec import FeatureCodec

WIDTH = 6


def _features(frames: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, WIDTH, generator=generator).to(dtype)


def _bits(tensor: Tensor) -> list[list[int]]:
    return tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_features_survive_to_the_last_bit(dtype: torch.dtype) -> None:
    codec = FeatureCodec(WIDTH, dtype)
    features = _features(5, dtype)
    features[0, 0], features[1, 1] = float("inf"), -0.0
    data = codec.encode(features)
    assert len(data) == 5 * codec.frame_bytes == 5 * WIDTH * features.element_size()
    assert codec.frames(data) == 5
    back = codec.decode(data)
    assert back.dtype == dtype and back.shape == (5, WIDTH)
    assert _bits(back) == _bits(features) == _bits(codec.roundtrip(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_view_is_written_as_it_reads(dtype: torch.dtype) -> None:
    """The encoder cuts its frames out of a batch."""
    codec = FeatureCodec(WIDTH, dtype)
    batch = _features(10, dtype).view(2, 5, WIDTH)
    part, turned = batch[1, 1:4], _features(WIDTH, dtype).T
    assert _bits(codec.decode(codec.encode(part))) == _bits(part)
    assert _bits(codec.decode(codec.encode(turned))) == _bits(turned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compact_features_are_off_by_half_a_level_at_most(dtype: torch.dtype) -> None:
    codec = FeatureCodec(WIDTH, dtype, "int8")
    features = _features(50, dtype) * torch.logspace(-3, 3, 50)[:, None].to(dtype)
    data = codec.encode(features)
    assert len(data) == 50 * codec.frame_bytes == 50 * (4 + WIDTH)
    back = codec.decode(data)
    assert back.dtype == dtype and back.shape == features.shape
    largest = features.float().abs().amax(dim=1, keepdim=True)
    rounding = largest / 254 + (largest / 256 if dtype == torch.bfloat16 else 1e-6 * largest)
    assert ((back.float() - features.float()).abs() <= rounding).all()
    assert not torch.equal(back, features), "something was rounded"
    assert torch.equal(codec.roundtrip(features), back)


def test_a_frame_of_zeros_and_a_loud_one_do_not_disturb_each_other() -> None:
    codec = FeatureCodec(2, torch.float32, "int8")
    features = torch.tensor([[0.0, 0.0], [127.0, -1.0], [1e-20, 0.0], [3e38, -3e38]])
    back = codec.decode(codec.encode(features))
    assert torch.allclose(back, features, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", ["exact", "int8"])
def test_bytes_of_several_utterances_are_decoded_together(format: str) -> None:
    codec = FeatureCodec(WIDTH, format=format)
    parts = [_features(n, torch.bfloat16, seed=n) for n in (3, 0, 7)]
    joined = codec.decode(b"".join(codec.encode(part) for part in parts))
    for part, back in zip(parts, joined.split([3, 0, 7]), strict=True):
        assert _bits(back) == _bits(codec.roundtrip(part))
    assert codec.encode(parts[1]) == b"" and codec.decode(b"").shape == (0, WIDTH)
