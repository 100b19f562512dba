"""Low-rank adapters (peft) in a frozen language model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omni.model.lm.gpt import GPT
from omni.model.shards import copy_

GPT_TARGETS = ("c_q", "c_k", "c_v", "c_proj", "c_fc")


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapters."""

    rank: int
    alpha: int
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers with an adapter; empty: all of the transformer's."""


def add_lora(lm: nn.Module, shape: LoraShape, seed: int = 0) -> None:
    """Freeze `lm` and insert adapters in fp32, which change nothing yet: their matrix B is zero.

    Raises ValueError where no layer has the name of a target.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets: str | list[str] = list(shape.targets)
    if not targets:
        targets = list(GPT_TARGETS) if isinstance(lm, GPT) else _linears(lm)
    config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


@torch.no_grad()
def init_adapters(lm: nn.Module, seed: int) -> None:
    """Draw the adapters of a sharded model as `add_lora` draws those of a whole one.

    peft draws the two linear layers of an adapter when it makes them, and A once more. Raises
    ValueError for an adapter of another kind of layer.
    """
    from peft.tuners.lora import LoraLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, found in lm.named_modules():
            if not isinstance(found, LoraLayer):
                continue
            module: Any = found
            if len(module.lora_embedding_A) or not len(module.lora_A):
                raise ValueError(
                    f"model.lora_targets: {name}: train.strategy fsdp has adapters of linear "
                    "layers only"
                )
            for adapter, layer in module.lora_A.items():
                rank, wide = layer.weight.shape
                outputs = module.lora_B[adapter].weight
                first = nn.Linear(wide, rank, bias=False)
                nn.Linear(rank, len(outputs), bias=False)
                nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
                copy_(layer.weight, first.weight)
                outputs.zero_()


@contextlib.contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """Switch the adapters off inside the context."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    trainable = [p for p in lm.parameters() if p.requires_grad]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)
        for parameter in lm.parameters():  # peft changes requires_grad as well.
            parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def merge_lora(lm: nn.Module) -> None:
    """Add the adapters to the weights of their layers and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(lm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(lm.get_submodule(parent), last, module.get_base_layer())


def _linears(lm: nn.Module) -> list[str]:
    """List the last names of all linear layers except the output head."""
    names = {name for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    return sorted({name.rpartition(".")[2] for name in names if not name.endswith("lm_head")})
