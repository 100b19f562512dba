"""Join the ranks of a worker group in a process group of torch.

`ray.train.torch` does the same, but imports torch into Ray Train's controller, which has no use for
it: three CPU seconds at every start.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from omni.cluster.ray_internals.train import free_address

_LEAVE_SECONDS = 30.0
"""Timeout of the end of a process group."""


@dataclass
class ProcessGroup(BackendConfig):
    """timeout_seconds: of a collective call."""

    timeout_seconds: int
    gpus: bool = False

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Start and end a process group from Ray Train's controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        address, port = worker_group.execute_single(0, free_address)
        world = len(worker_group)
        joins = [
            worker_group.execute_single_async(
                rank,
                join_group,
                world_rank=rank,
                world=world,
                address=address,
                port=port,
                config=backend_config,
            )
            for rank in range(world)
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        # A rank that hangs is killed with its process.
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave_group), timeout=_LEAVE_SECONDS)


def join_group(world_rank: int, world: int, address: str, port: int, config: ProcessGroup) -> None:
    """Join this process to the group of `world` ranks whose rank 0 listens at address:port.

    Sets the environment variables that torchrun sets, which libraries read.
    """
    import torch
    import torch.distributed as dist

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(world_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    if config.gpus:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
        # Without it, a rank waits for ever for one that is gone.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        backend="nccl" if config.gpus else "gloo",
        rank=world_rank,
        world_size=world,
        timeout=timedelta(seconds=config.timeout_seconds),
    )


def leave_group() -> None:
    """End the process group of this process, if it is in one of several ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
