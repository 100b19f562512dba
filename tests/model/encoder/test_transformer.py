"""A linear layer with its GELU, and the convolutions as matrix products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omni.model.encoder import transformer
from omni.model.encoder.transformer import linear_gelu
from omni.model.encoder.weights import EMBEDDED_WHISPER, read_whisper_files
from omni.model.precision import has_bf16

BF16 = pytest.mark.skipif(not has_bf16("cpu"), reason="this processor computes in fp32")


def _layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(300, 384), (1536, 384), (1536,)]
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight / 20, bias


@torch.inference_mode()
def test_a_layer_in_fp32_is_that_of_torch() -> None:
    x, weight, bias = _layer(torch.float32)
    assert torch.equal(linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)))


@BF16
@torch.inference_mode()
def test_the_fused_layer_is_nearer_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = _layer(torch.bfloat16)
    exact = F.gelu(F.linear(x.float(), weight.float(), bias.float()))
    fused = linear_gelu(x, weight, bias)
    monkeypatch.setattr(transformer, "_FUSED", None)
    usual = linear_gelu(x, weight, bias)
    assert torch.equal(usual, F.gelu(F.linear(x, weight, bias)))
    errors = [float((y.float() - exact).abs().mean()) for y in (fused, usual)]
    assert 0 < errors[0] < 0.8 * errors[1]


@BF16
@torch.inference_mode()
def test_a_row_of_the_fused_layer_does_not_depend_on_the_others() -> None:
    x, weight, bias = _layer(torch.bfloat16)
    whole = linear_gelu(x, weight, bias)
    for rows in (1, 7, 75, 150):
        assert torch.equal(linear_gelu(x[:rows], weight, bias), whole[:rows])


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[2], [4, 2, 30], [100, 98, 3000, 2]])
def test_windows_are_convolved_as_each_would_be_alone(
    encoder: transformer.WhisperTransformer, lengths: list[int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    mels = [torch.randn(80, length, generator=generator) for length in lengths]
    found = torch.split(encoder._embed_each(mels), [length // 2 for length in lengths])
    for mel, mine in zip(mels, found, strict=True):
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None]))))[0].T
        torch.testing.assert_close(mine, x + encoder.embed_positions.weight[: len(x)])


@pytest.fixture(scope="module")
def encoder() -> transformer.WhisperTransformer:
    config, state = read_whisper_files(EMBEDDED_WHISPER)
    return transformer.WhisperTransformer(config, state).float()
