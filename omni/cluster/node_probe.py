"""Examine the node of this process: GPUs, arithmetic, memory, disks, versions, network.

Nothing of omni's model is imported, and torch only where it computes.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from datetime import timedelta

import ray

import omni
from omni.cluster.gpu_health import gpu_health
from omni.cluster.ray_internals.core import object_store_folders
from omni.cluster.versions import code_digest, installed_versions

_SMI_SECONDS = 30.0
"""Timeout of nvidia-smi, which takes seconds where the driver is not kept loaded."""
_SHARED_BYTES = 1 << 30
"""Least shared memory of a node whose GPUs train together; containers have 64 MiB by default."""
_DISK_BYTES = 1 << 30
_FULL = 0.95
"""Share of a disk from which on Ray spills no more to it."""
_SIZE = 1024
"""Rows of the matrices that are multiplied."""
_SUMMED = 1 << 20
"""Numbers that the nodes add up."""


@dataclass(frozen=True)
class NodeFacts:
    """Findings on one node. faults: reasons to leave it out. notes: remarks."""

    faults: list[str]
    notes: list[str]
    versions: dict[str, str]
    driver: str | None


class NodeProbe:
    """Actor that examines its node."""

    def facts(self, gpus: int, store_bytes: float) -> NodeFacts:
        """Examine everything that needs no computation.

        gpus: those that Ray has on this node, 0 where the run uses none. store_bytes: size of
        Ray's object store.
        """
        faults, notes, driver = [], [], None
        if gpus:
            health = gpu_health(gpus, _visible_gpus(), _SMI_SECONDS)
            faults, notes, driver = [*health.faults], [*health.notes], health.driver
        shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
        if gpus > 1 and shared < _SHARED_BYTES:
            faults.append(f"/dev/shm has {shared >> 20} MiB; NCCL needs 1 GiB for {gpus} GPUs")
        folders = object_store_folders()
        if folders.get("plasma", "/dev/shm") != "/dev/shm":
            notes.append(
                f"Ray keeps objects in {folders['plasma']}, on disk: /dev/shm has "
                f"{shared >> 20} MiB, and the object store {int(store_bytes) >> 20} MiB"
            )
        if "fallback" in folders:
            disk = shutil.disk_usage(folders["fallback"])
            used = 1 - disk.free / disk.total
            if disk.free < _DISK_BYTES:
                faults.append(f"{folders['fallback']}, to which Ray spills, has no space left")
            elif used > _FULL:
                notes.append(f"{folders['fallback']}: {used:.0%} full, Ray spills no more to it")
        return NodeFacts(faults, notes, own_versions(), driver)

    def multiply(self) -> list[str]:
        """Multiply matrices with a known product on each GPU, or on the CPU; return faults."""
        import torch

        torch.set_num_threads(1)
        count = len(ray.get_gpu_ids())
        if count and torch.cuda.device_count() < count:
            return [f"torch finds {torch.cuda.device_count()} of {count} GPUs{_cuda_error()}"]
        devices = [f"cuda:{index}" for index in range(count)] or ["cpu"]
        return [fault for device in devices if (fault := _wrong_product(device)) is not None]

    def warm_up(self) -> None:
        """Import torch, so that the time limit of what follows is that of the network."""
        import torch.distributed  # noqa: F401

    def free_address(self) -> tuple[str, int]:
        """Find an address at which the other nodes can meet this one."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def add_up(
        self, address: str, port: int, rank: int, world: int, gpus: bool, seconds: float
    ) -> None:
        """Add numbers up over `world` nodes, whose rank 0 listens at address:port.

        gpus: with NCCL on the first GPU of each, else with gloo. Raises RuntimeError.
        """
        import torch
        import torch.distributed as dist

        # The timeout is an exception here; by default it ends the process.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        device = torch.device("cuda", 0) if gpus else torch.device("cpu")
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        try:
            numbers = torch.full((_SUMMED,), float(rank + 1), device=device)
            dist.all_reduce(numbers)
            expected = world * (world + 1) / 2
            if not bool((numbers == expected).all()):
                raise RuntimeError(f"the sum over {world} nodes is wrong")
        finally:
            dist.destroy_process_group()


def own_versions() -> dict[str, str]:
    """Return the versions here that must be the same on all nodes."""
    found = {name: v for name, v in installed_versions().items() if name in ("torch", "ray")}
    return {**found, "omni": f"{omni.__version__} ({code_digest()})"}


def _visible_gpus() -> list[str]:
    return [str(gpu) for gpu in ray.get_gpu_ids()]


def _wrong_product(device: str) -> str | None:
    """Multiply a Hadamard matrix with itself, and compare the product with n times the identity.

    All sums are whole numbers, so that the result is exact in every number format.
    """
    import torch

    try:
        matrix = torch.ones(1, 1, device=device)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
        while len(matrix) < _SIZE:
            matrix = torch.kron(matrix, two)
        expected = _SIZE * torch.eye(_SIZE, device=device)
        formats = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
        for dtype in formats:
            given = matrix.to(dtype)
            if not torch.equal((given @ given).float(), expected):
                return f"{device}: a product of matrices in {dtype} is wrong"
    except (RuntimeError, AssertionError) as error:
        return f"{device}: {str(error).partition(chr(10))[0]}"
    return None


def _cuda_error() -> str:
    """Return why torch cannot use CUDA, where it says so."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).partition(chr(10))[0]})"
    return ""
