"""Sums and lists over all ranks, and tensors that are split over them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective call); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor laid out as a parameter of the same shape: on its device, in its shards."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks; the values themselves without a process group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        moved = values.to(device)
        dist.all_reduce(moved)
        return moved.to(values.device)
    return values


def all_gather(items: list[Any]) -> list[Any]:
    """The lists of all ranks, one after another."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return items
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
