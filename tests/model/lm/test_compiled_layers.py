"""Compiled layers compute what the others do, in few graphs.

The backend "eager" traces and guards as the real one does, without a C++ or GPU compiler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from omni.model import packed_attention
from omni.model.packed_attention import SegmentLayout, compile_fully
from tests.helpers.small_gpt import SMALL, awake_gpt, packed_row, random_ids


@torch.no_grad()
def test_compiled_layers_compute_the_same_in_two_graphs() -> None:
    """One graph for layers with value embeddings and one for those without, whatever the window."""
    model = awake_gpt(replace(SMALL, n_layer=6)).train()
    segments = packed_row([60, 3, 175, 41, 1], 384)
    idx = random_ids(*segments.shape)
    x = model.embed(idx)
    wanted = model.trunk(x, idx, SegmentLayout.packed(segments, "flex"))
    torch._dynamo.reset()
    counters["stats"].clear()
    model.compile_layers(backend="eager")
    for again in (segments, packed_row([100, 200], 384), segments):
        found = model.trunk(x, idx, SegmentLayout.packed(again, "flex"))
    assert torch.equal(found[segments > 0], wanted[segments > 0])
    assert counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_evaluation_and_other_kernels_are_not_compiled() -> None:
    model = awake_gpt().eval()
    segments = packed_row([20, 30], 64)
    idx = random_ids(*segments.shape)

    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model.compile_layers(backend=refuse)
    model.trunk(model.embed(idx), idx, SegmentLayout.packed(segments, "flex"))
    model.train()
    model.trunk(model.embed(idx), idx, SegmentLayout.packed(segments, "groups"))
    with pytest.raises(Exception, match="compiled"):
        model.trunk(model.embed(idx), idx, SegmentLayout.packed(segments, "flex"))


def test_a_function_with_more_shapes_than_may_be_compiled_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch would run it uncompiled from then on, slower and in more memory."""
    monkeypatch.setattr(packed_attention, "_SHAPES", 3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        double = compile_fully(lambda x: 2 * x, backend="eager")
        for length in (2, 3, 4):
            double(torch.ones(length))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            double(torch.ones(5))
