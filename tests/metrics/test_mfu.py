"""What share of a GPU's peak the model's products are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omni.metrics.mfu import flops_per_position, peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 165e12),
        ("Tesla K80", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


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
