"""Model FLOPs utilisation: the share of a GPU's peak that goes into the model's own products.

6 FLOPs for each weight of the layers and each position (Kaplan et al. 2020), 4 for a weight that is
frozen: its own gradient is not computed. Attention's products and embeddings are left out.
"""

from __future__ import annotations

import torch
from torch import nn

# Dense bf16 FLOP/s that the makers name, without sparsity.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Of this GPU in bf16; None where that is not known, as on a CPU."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """name: as the driver gives it, such as "NVIDIA H100 80GB HBM3"."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in _PEAKS.items() if f" {known} " in words), None)


def flops_per_position(model: nn.Module) -> int:
    """Of a training step. Matrices count, tables of embeddings do not."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(
        (6 if parameter.requires_grad else 4) * parameter.numel()
        for parameter in model.parameters()
        if parameter.ndim >= 2 and id(parameter) not in tables
    )
