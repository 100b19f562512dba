"""Reduce and gather over all ranks; gather and shard tensors. Without a process group: one rank."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective call); return any other as it is."""
    if not is_sharded(tensor):
        return tensor
    gathered: Any = tensor
    full: Tensor = gathered.full_tensor()
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this rank holds a part of the tensor only (a DTensor)."""
    # Where nothing is sharded, the module is not imported: it takes a second of each process.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Move a full tensor to the device of `parameter`, and into its shards where it has any."""
    value = value.to(parameter.device)
    if is_sharded(parameter) and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
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
