"""Choose the dtype that a device computes in, and limit the memory that a process takes of it."""

from __future__ import annotations

import functools

import torch


def compute_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """Return `wanted`, or fp32 for bf16 on a processor that has no instructions for it.

    Such a processor multiplies bf16 in software: several times slower than fp32 forward, and tens
    of times backward.
    """
    return wanted if wanted != torch.bfloat16 or has_bf16(device.type) else torch.float32


def limit_gpu_memory(share: float | None) -> None:
    """Let this process allocate at most a share of its GPU's memory; None: no limit.

    Beyond it, torch raises OutOfMemoryError in this process, and leaves the rest to the others.
    """
    if share is not None:
        torch.cuda.set_per_process_memory_fraction(share)


@functools.cache
def has_bf16(device_type: str) -> bool:
    """Tell whether this machine's devices of a type multiply bf16 in hardware."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device_type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
