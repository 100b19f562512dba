"""What share of a GPU's peak the model's products are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omni.metrics.throughput import flops_per_position, peak_flops, peak_of


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("NVIDIA H100 PCIe", "NVIDIA H100 NVL"),
        ("NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA L4", "NVIDIA L40S"),
        ("NVIDIA A10G", "NVIDIA A10"),
        ("NVIDIA A10", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_gpus_whose_names_begin_alike_are_told_apart(slower: str, faster: str) -> None:
    low, high = peak_of(slower), peak_of(faster)
    assert low is not None and high is not None and low < high


@pytest.mark.parametrize("name", ["Tesla K80", "NVIDIA L400", "NVIDIA"])
def test_a_gpu_that_is_not_known_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_a_cpu_has_no_peak_that_we_know() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_weights_of_products_count_and_frozen_ones_less() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert flops_per_position(model) == 6 * (8 * 4 + 4 * 2)
    model[1].requires_grad_(False)
    assert flops_per_position(model) == 4 * 8 * 4 + 6 * 4 * 2
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight
    assert flops_per_position(tied) == 0, "said in the module: embeddings are left out"
