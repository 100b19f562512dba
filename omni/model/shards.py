"""Tensors that are split over ranks by rows (DTensors of FSDP), and how they are filled."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this rank holds a part of the tensor only (a DTensor)."""
    # Where nothing is sharded, the module is not imported: it takes a second of each process.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective call); return any other as it is."""
    if not is_sharded(tensor):
        return tensor
    gathered: Any = tensor
    full: Tensor = gathered.full_tensor()
    return full


def local_part(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds, which share memory with the tensor."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    local: Tensor = sharded.detach().to_local()
    return local


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the first row that this rank holds, and the end of its rows."""
    rows = len(tensor)
    if not is_sharded(tensor):
        return 0, rows
    sharded: Any = tensor
    (placement,) = sharded.placements
    assert placement.is_shard(0), placement
    most = -(-rows // sharded.device_mesh.size())
    first = min(sharded.device_mesh.get_local_rank() * most, rows)
    return first, min(first + most, rows)


@torch.no_grad()
def set_rows(tensor: Tensor, read: Callable[[int, int], Tensor]) -> None:
    """Fill the rows that this rank holds; read: returns rows of the whole by first and end."""
    first, end = local_rows(tensor)
    if end > first:
        local_part(tensor).copy_(read(first, end))


def like_shard(tensor: Tensor, read: Callable[[int, int], Tensor]) -> Tensor:
    """Make a tensor that is placed and split as `tensor`, with the dtype of what `read` returns."""
    local = local_part(tensor)
    values = read(*local_rows(tensor)).to(local.device, copy=True).reshape(local.shape)
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor
    return DTensor.from_local(
        values,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


# -- initial values ----------------------------------------------------------------------------


def uniform_(tensor: Tensor, low: float, high: float, generator: torch.Generator | None) -> None:
    """Draw as `Tensor.uniform_`; each rank keeps its rows of what one rank would have drawn."""
    _draw(tensor, lambda whole: whole.uniform_(low, high, generator=generator))


def normal_(tensor: Tensor, mean: float, std: float, generator: torch.Generator | None) -> None:
    """Draw as `Tensor.normal_`; see `uniform_`."""
    _draw(tensor, lambda whole: whole.normal_(mean, std, generator=generator))


def copy_(tensor: Tensor, whole: Tensor) -> None:
    """Copy the values of a whole tensor into one that may be sharded."""
    set_rows(tensor, lambda first, end: whole[first:end])


@torch.no_grad()
def _draw(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    if is_sharded(tensor):
        # One tensor at a time is whole here, and on the CPU, whose generator it is.
        copy_(tensor, draw(torch.empty(tensor.shape, dtype=tensor.dtype)))
    else:
        draw(tensor)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Keep no data of parameters that modules register inside the context; buffers keep theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a sharded model memory on `device`, and move its buffers there."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
