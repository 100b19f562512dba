"""The projector starts silent and bounded; frames are stacked in order."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.model.projector import (
    PROJECTORS,
    START_RMS,
    LayerMix,
    Projector,
    make_projector,
    soft_tokens,
    stack_frames,
)


def fresh(*shape: int) -> Projector:
    projector = Projector(*shape)
    projector.init_weights(torch.Generator().manual_seed(0))
    return projector


def test_fc1_starts_uniform_with_unit_gain_and_fc2_at_zero() -> None:
    projector = fresh(384, 96, 200)
    bound = math.sqrt(3 / 384)
    weight = projector.fc1.weight.detach()
    assert 0.99 * bound < float(weight.max()) <= bound
    assert -bound <= float(weight.min()) < -0.99 * bound
    assert float(weight.std()) == pytest.approx(384**-0.5, rel=0.01)
    assert not projector.fc2.weight.any()


@torch.no_grad()
def test_unit_variance_input_gives_unit_variance_hidden_values() -> None:
    x = torch.randn(500, 384, generator=torch.Generator().manual_seed(1))
    assert float(fresh(384, 96).fc1(x).std()) == pytest.approx(1.0, rel=0.05)


def test_there_are_two_weights_and_no_bias() -> None:
    shapes = {name: tuple(p.shape) for name, p in Projector(12, 5, 7).named_parameters()}
    assert shapes == {"fc1.weight": (7, 12), "fc2.weight": (5, 7)}
    # The hidden width is that of the output unless it is given.
    assert Projector(12, 5).fc1.weight.shape == (5, 12)


def test_an_untrained_projector_adds_nothing_to_the_stream() -> None:
    assert not fresh(12, 5)(torch.randn(3, 12)).any()


def test_forward_is_fc2_of_gelu_of_fc1() -> None:
    projector = fresh(6, 4, 8).double()
    torch.nn.init.normal_(projector.fc2.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = x @ projector.fc1.weight.T
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(projector(x), gelu @ projector.fc2.weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_runs_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    projector = fresh(6, 4)
    assert projector(torch.ones(2, 6, dtype=dtype)).dtype == dtype
    assert projector.fc1.weight.dtype == torch.float32


@torch.no_grad()
def test_a_projector_can_start_at_a_small_size() -> None:
    projector = fresh(512, 256)
    projector.init_output(torch.Generator().manual_seed(0))
    x = torch.randn(400, 512, generator=torch.Generator().manual_seed(1))
    assert float(projector(x).square().mean().sqrt()) == pytest.approx(START_RMS, rel=0.1)


def test_the_first_gradient_reaches_fc2() -> None:
    projector = fresh(6, 4)
    projector(torch.ones(2, 6)).sum().backward()
    assert projector.fc2.weight.grad is not None and projector.fc2.weight.grad.any()


def test_stacked_frames_lie_side_by_side_and_the_last_row_is_zero_padded() -> None:
    frames = torch.arange(1.0, 11.0).view(5, 2)
    assert stack_frames(frames, 2).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert stack_frames(frames, 5).tolist() == [list(range(1, 11))]
    assert stack_frames(frames, 8).tolist() == [[*range(1, 11), *[0] * 6]]


def test_a_stack_of_one_is_the_identity() -> None:
    frames = torch.randn(7, 3)
    assert torch.equal(stack_frames(frames, 1), frames)


@pytest.mark.parametrize("stack", [1, 2, 4, 5])
@pytest.mark.parametrize("frames", [0, 1, 4, 5, 39])
def test_soft_tokens_counts_the_rows_that_stacking_makes(frames: int, stack: int) -> None:
    assert soft_tokens(frames, stack) == len(stack_frames(torch.zeros(frames, 3), stack))


# --- all kinds -----------------------------------------------------------------------------------

STACK, FRAME, WIDTH = 4, 12, 16


def a_projector(kind: str) -> nn.Module:
    projector = make_projector(kind, STACK, FRAME, WIDTH, None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return projector


def frames_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, FRAME, generator=generator) for length in lengths]


def side_by_side(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacked frames of recordings one after another, and where each begins."""
    stacked = [stack_frames(f, STACK) for f in features]
    starts = torch.zeros(sum(map(len, stacked)), dtype=torch.bool)
    at = 0
    for part in stacked:
        starts[at] = True
        at += len(part)
    return torch.cat(stacked), starts


@pytest.mark.parametrize("kind", PROJECTORS)
@torch.no_grad()
def test_soft_tokens_do_not_depend_on_the_neighbours(kind: str) -> None:
    projector = a_projector(kind)
    features = frames_of(9, 4, 30, 1)
    together = projector(*side_by_side(features))
    alone = torch.cat([projector(*side_by_side([f])) for f in features])
    assert together.shape == (3 + 1 + 8 + 1, WIDTH)
    torch.testing.assert_close(together, alone)
    assert projector(*side_by_side(features[:1])).abs().max() > 0


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_weight_learns(kind: str) -> None:
    projector = a_projector(kind)
    projector(*side_by_side(frames_of(9, 30))).square().sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("kind", PROJECTORS)
@torch.no_grad()
def test_silence_of_a_batch_without_audio(kind: str) -> None:
    empty = torch.zeros(0, STACK * FRAME), torch.zeros(0, dtype=torch.bool)
    assert a_projector(kind)(*empty).shape == (0, WIDTH)


@pytest.mark.parametrize("kind", ["swiglu", "conv"])
@torch.no_grad()
def test_projectors_for_trained_language_models_begin_with_unit_size(kind: str) -> None:
    projector = make_projector(kind, STACK, FRAME, WIDTH, None)
    soft = projector(*side_by_side([f * 50 for f in frames_of(400)]))
    assert float(soft.square().mean()) == pytest.approx(1.0, rel=0.05)


@torch.no_grad()
def test_the_conv_projector_is_torchs_convolution() -> None:
    projector = a_projector("conv")
    (features,) = frames_of(16)
    x = projector.norm_in(features).T[None]
    for conv in projector.convs:
        kernel = conv.weight.view(WIDTH, 3, -1).transpose(1, 2)
        x = F.gelu(F.conv1d(x, kernel, stride=2, padding=1))
    wanted = projector.norm_out(projector.out(x[0].T))
    torch.testing.assert_close(projector(*side_by_side([features])), wanted)


def test_the_conv_projector_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match=r"\bconv\b.*\bstack 5\b"):
        make_projector("conv", 5, FRAME, WIDTH, None)


# --- layers --------------------------------------------------------------------------------------


def test_layers_are_mixed_by_learnt_weights() -> None:
    mix = LayerMix(3, FRAME)
    layers = torch.randn(3, 7, FRAME, generator=torch.Generator().manual_seed(2))
    frames = layers.transpose(0, 1).flatten(1)  # as they travel: side by side in a frame
    stacked = stack_frames(frames, STACK)
    torch.testing.assert_close(mix(stacked), stack_frames(layers.mean(0), STACK))
    with torch.no_grad():
        mix.logits.copy_(torch.tensor([0.0, 50.0, 0.0]))
    torch.testing.assert_close(mix(stacked), stack_frames(layers[1], STACK))
    mix(stacked).square().sum().backward()
    assert mix.logits.grad is not None
    assert mix(stacked[:0]).shape == (0, STACK * FRAME), "a rank may have a step without audio"
