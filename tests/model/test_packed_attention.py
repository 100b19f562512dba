"""Utterances that share a row do not know of each other, forwards or backwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.model.lm.gpt import GPT
from omni.model.packed_attention import Kernel, SegmentLayout, causal_attention
from tests.helpers.small_gpt import SMALL, awake_gpt, packed_row, random_ids

KERNELS: tuple[Kernel, Kernel] = ("groups", "flex")
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def assert_each_segment_stands_alone(model: GPT, idx: Tensor, segments: Tensor) -> None:
    logits = model(idx, segments=segments)
    assert logits.isfinite().all()
    for row in range(len(idx)):
        for number in segments[row].unique().tolist():
            if number:
                here = segments[row] == number
                alone = model(idx[row, here][None])
                torch.testing.assert_close(logits[row, here][None], alone, **TOLERANCE)


# Segments shorter and longer than the short window of 128 and than the sequence length of 256, of
# one position, of similar lengths (one group) and of very different ones.
LENGTHS = {
    "one": [30],
    "similar": [20, 19, 20, 15],
    "mixed": [5, 300, 1, 140, 170, 128, 129, 130],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("padding", [0, 9])
@torch.inference_mode()
def test_a_packed_segment_equals_itself_alone(lengths: list[int], padding: int) -> None:
    segments = packed_row(lengths, sum(lengths) + padding)
    assert_each_segment_stands_alone(awake_gpt(), random_ids(*segments.shape), segments)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@torch.inference_mode()
def test_packing_serves_grouped_and_full_heads(n_kv_head: int) -> None:
    model = awake_gpt(replace(SMALL, n_kv_head=n_kv_head))
    segments = packed_row([40, 150, 3], 200)
    assert_each_segment_stands_alone(model, random_ids(*segments.shape), segments)


@torch.inference_mode()
def test_rows_are_apart_even_where_their_segments_share_a_number() -> None:
    # Row 0 ends with its segment 1 and row 1 begins with its own: numbers count per row.
    segments = torch.tensor([[1] * 24, [1] * 10 + [2] * 14, [0] * 24, [1] * 4 + [0] * 20])
    assert_each_segment_stands_alone(awake_gpt(), random_ids(4, 24), segments)


@torch.inference_mode()
def test_padding_may_lie_between_segments() -> None:
    segments = torch.tensor([[0] * 3 + [1] * 10 + [0] * 4 + [2] * 12 + [0]])
    assert_each_segment_stands_alone(awake_gpt(), random_ids(1, 30), segments)


@torch.inference_mode()
def test_changing_one_utterance_changes_nothing_in_another() -> None:
    model = awake_gpt()
    assert model.smear_lambda.item() > 0.1, "smear reads the position before"
    segments = packed_row([17, 23, 20], 64)
    idx = random_ids(1, 64)
    changed = torch.where(segments == 2, (idx + 1) % SMALL.vocab_size, idx)
    before, after = model(idx, segments=segments), model(changed, segments=segments)
    apart = (before - after).abs().amax(-1)
    assert apart[(segments == 1) | (segments == 3)].max() == 0.0
    assert apart[segments == 2].min() > 1e-3


@torch.inference_mode()
def test_the_length_of_a_neighbour_does_not_matter() -> None:
    model, idx = awake_gpt(), random_ids(1, 300)
    beside_short = model(idx, segments=packed_row([50, 40], 300))
    beside_long = model(idx, segments=packed_row([50, 250], 300))
    torch.testing.assert_close(beside_short[:, :50], beside_long[:, :50], **TOLERANCE)


def test_gradients_do_not_leak_between_segments() -> None:
    model = awake_gpt()
    segments, idx = packed_row([17, 23, 20], 64), random_ids(1, 64)
    x = model.embed(idx).detach().requires_grad_()
    hidden = model.trunk(x, idx, SegmentLayout.packed(segments))
    hidden[segments == 2].square().sum().backward()
    assert x.grad is not None
    size = x.grad.abs().amax(-1)
    assert size[segments != 2].max() == 0.0
    assert size[segments == 2].min() > 0.0


def test_packed_gradients_are_the_sum_of_those_alone() -> None:
    lengths = [5, 140, 30]
    segments, idx = packed_row(lengths, 180), random_ids(1, 180)
    targets = torch.where(segments > 0, random_ids(1, 180, seed=2), -1)
    together, alone = awake_gpt(), awake_gpt()
    together(idx, targets, segments=segments, reduction="sum").backward()
    for number in range(1, len(lengths) + 1):
        here = segments[0] == number
        alone(idx[:, here], targets[:, here], reduction="sum").backward()
    for (name, packed), single in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert packed.grad is not None and single.grad is not None
        scale = float(single.grad.abs().max())
        assert scale > 0, name
        assert float((packed.grad - single.grad).abs().max()) < 1e-5 * max(scale, 1.0), name


def test_a_bin_of_padding_gives_every_parameter_a_gradient_of_zero() -> None:
    # A worker with nothing to do still takes part in the all-reduce: zero, and not None.
    model = awake_gpt()
    nothing = torch.zeros(1, 32, dtype=torch.long)
    loss = model(nothing, nothing - 1, segments=nothing, reduction="sum")
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_positions_count_from_the_start_of_each_segment() -> None:
    layout = SegmentLayout.packed(torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]]))
    assert layout.positions_BT[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert layout.positions_BT[1].tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("kernel", ["groups", "flex"])
@pytest.mark.parametrize("window", [4, 64, 500])
@torch.inference_mode()
def test_attention_equals_softmax_under_one_dense_mask(window: int, kernel: Kernel) -> None:
    segments = torch.cat((packed_row([60, 3, 175, 41, 1], 290), packed_row([200, 90], 290)))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 290, 4, 8, generator=generator)
    k, v = (torch.randn(2, 290, 2, 8, generator=generator) for _ in range(2))
    steps = torch.arange(290)
    distance = steps[:, None] - steps
    same = segments[:, :, None] == segments[:, None, :]
    mask = same & (distance >= 0) & (distance <= window)  # (B, T, T)
    k_all, v_all = (t.repeat_interleave(2, dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k_all) / 8**0.5
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    wanted = torch.einsum("bhts,bshd->bthd", weights, v_all)
    attended = SegmentLayout.packed(segments, kernel).attend(q, k, v, window)
    real = segments > 0
    torch.testing.assert_close(attended[real], wanted[real], **TOLERANCE)
    assert attended.isfinite().all()
    if kernel == "groups":
        assert not attended[~real].any(), "padding attends to nothing"


@torch.inference_mode()
def test_both_kernels_serve_a_whole_model_alike() -> None:
    model = awake_gpt()
    segments = packed_row(LENGTHS["mixed"], 1100)
    idx = random_ids(*segments.shape)
    x = model.embed(idx)
    groups, flex = (
        model.trunk(x, idx, SegmentLayout.packed(segments, kernel)) for kernel in KERNELS
    )
    real = segments > 0
    torch.testing.assert_close(flex[real], groups[real], **TOLERANCE)


@pytest.mark.parametrize("window", [0, 7, 64, 1000])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.bfloat16, 0.03)])
def test_products_equal_the_fused_kernel_forwards_and_backwards(
    window: int, dtype: torch.dtype, atol: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 65, 2, 8)
    q, k, v, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    steps = torch.arange(65)
    seen = (steps[:, None] >= steps) & (steps[:, None] - steps <= window)
    results = []
    for fused in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        if fused:
            turned = [t.transpose(1, 2) for t in leaves]
            out = F.scaled_dot_product_attention(*turned, attn_mask=seen).transpose(1, 2)
        else:
            out = causal_attention(leaves[0], leaves[1], leaves[2], window)
        results.append((out, *torch.autograd.grad(out, leaves, g)))
    for products, reference in zip(*results, strict=True):
        torch.testing.assert_close(products, reference, rtol=0.02, atol=atol)
