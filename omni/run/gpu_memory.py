"""Compare the estimated memory of a worker with that of its GPU, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from omni.cluster.capacity import Labels, Node, cluster_nodes, selectors
from omni.config import Config
from omni.errors import ConfigError
from omni.metrics.throughput import memory_of
from omni.model.batch import Batch
from omni.run.fake_step import Device
from omni.run.memory import Memory, estimate_memory, size_text
from omni.run.prepare import Prepared
from omni.stream.schema import EncodedRow, utterances
from omni.train.evaluation import Layout

_ACCELERATOR = "accelerator_type:"
"""Beginning of the resource by which Ray tells the kind of a node's GPUs."""
_LOOK_SECONDS = 60.0


@dataclass(frozen=True)
class Gpu:
    """Name and bytes of memory of a GPU; measured: by its driver, else known by its name."""

    name: str
    bytes: int
    measured: bool = False

    def __str__(self) -> str:
        return f"{size_text(self.bytes)} of {self.name}" + ("" if self.measured else " by its name")


def check_memory(prepared: Prepared, block: pa.Table) -> str:
    """Estimate the memory of a worker for `block` of the plan; return it in one line.

    Raises ConfigError, naming what to change, where the GPU of a worker has less.
    """
    train = prepared.config.train
    need = Need(prepared, block)
    memory = need.memory(prepared.config)
    text = f"memory: a worker needs about {size_text(memory.needed)}"
    gpu = find_gpu(prepared.config) if train.gpus else None
    if gpu is None:
        unknown = "; the memory of the GPUs is not known here" if train.gpus else ""
        return f"{text} ({memory}){unknown}"
    share = memory_share(prepared.config)
    room = int(gpu.bytes * share)
    if memory.least > room:
        raise ConfigError(need.refusal(memory, room, gpu))
    tight = " and is tight" if memory.needed > room else ""
    part = "" if share == 1 else f"{share:.0%} of the "
    return f"{text}{tight}, of {part}{gpu} ({memory})"


def memory_share(config: Config) -> float:
    """Return the share of a GPU's memory that a worker may take."""
    train = config.train
    if train.gpu_memory is not None:
        return train.gpu_memory
    return train.gpus if train.gpus < 1 else 1.0


class Need:
    """The memory that a worker needs, with the run's config and with others."""

    def __init__(self, prepared: Prepared, block: pa.Table) -> None:
        self._prepared = prepared
        self._rows: list[EncodedRow] = block.to_pylist()

    def memory(self, config: Config) -> Memory:
        prepared, train = self._prepared, config.train
        device: Device = "cuda" if train.gpus else "cpu"
        return estimate_memory(
            config, prepared.model, self._batch(config), train.least, device, len(prepared.tasks)
        )

    def _batch(self, config: Config) -> Batch:
        rows = self._rows[: config.optim.bins_per_block]
        codec = self._prepared.encoder.codec
        layout = Layout.of(config, self._prepared.model)
        return layout.batch([utterances(row, codec) for row in rows])

    def refusal(self, memory: Memory, room: int, gpu: Gpu) -> str:
        """Explain that a worker does not fit, and what would make it fit."""
        changed, changes = self._prepared.config, list[str]()
        least = memory
        for name, changed in _smaller(self._prepared.config):
            found = self.memory(changed)
            if found.peak > 0.98 * least.peak:
                continue
            changes.append(name)
            least = found
            if found.least <= room:
                break
        names = ", ".join(name.split()[0] for name in changes) or "optim.bin_positions"
        problem = (
            f"{names}: a worker needs about {size_text(memory.needed)} of GPU memory ({memory}) "
            f"and has {size_text(room)} ({gpu}); "
        )
        with_all = f"{' and '.join(changes)} ({size_text(least.needed)})"
        if changes and least.least <= room:
            return f"{problem}expected {with_all}"
        even = f"also with {with_all} it is too much; " if changes else ""
        return (
            f"{problem}{even}expected shorter optim.bin_positions, model.train with lora in place "
            "of lm, or a smaller model.lm"
        )


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield changes that save memory, each on top of those before."""
    optim, train = config.optim, config.train
    if not train.recompute:
        train = train.model_copy(update={"recompute": True})
        config = config.model_copy(update={"train": train})
        yield "train.recompute true", config
    if optim.bins_per_block > 1:
        optim = optim.model_copy(update={"bins_per_block": 1})
        config = config.model_copy(update={"optim": optim})
        yield "optim.bins_per_block 1", config
    if train.strategy == "ddp" and train.least > 1:
        train = train.model_copy(update={"strategy": "fsdp"})
        config = config.model_copy(update={"train": train})
        yield "train.strategy fsdp", config


# -- the GPU -----------------------------------------------------------------------------------


def find_gpu(config: Config) -> Gpu | None:
    """Find the GPU with the least memory that a worker may get.

    A worker asks its driver; the other nodes are known by the name that Ray has of their GPUs.
    """
    train = config.train
    labels, _, _ = selectors(config)
    look: Any = ray.remote(_look_at_gpu).options(
        num_cpus=train.cpus, num_gpus=train.gpus, label_selector=labels, max_retries=1
    )
    answer = look.remote()
    try:
        seen = ray.get(answer, timeout=_LOOK_SECONDS)
    except RayError:  # The trial that follows says what is wrong with the node.
        ray.cancel(answer)
        seen = None
    named = named_gpus(cluster_nodes(), labels)
    return min([*named, *([seen] if seen else [])], key=lambda gpu: gpu.bytes, default=None)


def _look_at_gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], measured=True)


def named_gpus(nodes: Sequence[Node], labels: Labels) -> list[Gpu]:
    """List the GPUs of the nodes with `labels` whose names tell their memory."""
    names = {
        resource.removeprefix(_ACCELERATOR)
        for node in nodes
        if node.resources.get("GPU") and node.has(labels)
        for resource in node.resources
        if resource.startswith(_ACCELERATOR)
    }
    sizes = {name: memory_of(name) for name in names}
    return [Gpu(name, size) for name, size in sorted(sizes.items()) if size is not None]
