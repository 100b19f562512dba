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


def test_autocast_computes_weights_of_fp32_too() -> None:
    x, weight, bias = _layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_gelu(x.bfloat16(), weight, bias)
    torch.testing.assert_close(found.float(), linear_gelu(x, weight, bias), atol=0.1, rtol=0.05)


@torch.inference_mode()
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=BF16)]
)
@pytest.mark.parametrize("lengths", [[2], [4, 2, 30], [100, 98, 3000, 2]])
def test_windows_are_convolved_as_each_would_be_alone(
    lengths: list[int], dtype: torch.dtype
) -> None:
    config, state = read_whisper_files(EMBEDDED_WHISPER)
    encoder = transformer.WhisperTransformer(config, state).double()
    generator = torch.Generator().manual_seed(1)
    mels = [torch.randn(80, length, generator=generator).to(dtype) for length in lengths]
    wanted = []
    for mel in mels:
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None].double()))))[0].T
        wanted.append(x + encoder.embed_positions.weight[: len(x)])
    found = encoder.to(dtype)._embed_each(mels)
    for one, mine in zip(wanted, torch.split(found, [n // 2 for n in lengths]), strict=True):
        error = (mine.double() - one).norm() / one.norm()
        assert error < {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def test_windows_of_an_odd_length_are_refused() -> None:
    config, state = read_whisper_files(EMBEDDED_WHISPER)
    encoder = transformer.WhisperTransformer(config, state)
    for padded in (False, True):
        with pytest.raises(ValueError, match="even number of frames, got 5"):
            encoder.encode([torch.zeros(80, 4), torch.zeros(80, 5)], padded)
