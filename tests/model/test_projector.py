"""The projector starts silent and bounded; frames are stacked in order."""

from __future__ import annotations

import math

import pytest
import torch

from omni.model.projector import Projector, soft_tokens, stack_frames


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
