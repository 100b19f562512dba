"""Reduce and gather over all ranks. Without a process group: one rank."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def all_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks. A collective call."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        moved = values.to(device)
        dist.all_reduce(moved)
        return moved.to(values.device)
    return values


def all_gather(items: list[T]) -> list[T]:
    """Concatenate the lists of all ranks, in the order of ranks. A collective call."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return items
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def broadcast(values: Tensor) -> Tensor:
    """Overwrite a contiguous tensor with that of rank 0, and return it. A collective call."""
    # As bytes: not every backend knows every dtype.
    dist.broadcast(values.view(-1).view(torch.uint8), 0)
    return values


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
