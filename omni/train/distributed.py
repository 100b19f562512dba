"""Reduce and gather over all ranks; gather and shard tensors. Without a process group: one rank."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective call); return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Move a full tensor to the device of `parameter`, and into its shards where it has any."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value


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


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
