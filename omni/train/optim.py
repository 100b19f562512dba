"""Build optimizers, schedule their learning rates, average weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni.config import OptimConfig
from omni.model.lm.gpt import GPT
from omni.model.lm.hf import HFLanguageModel
from omni.model.lm.lora import is_adapter
from omni.model.shards import like_shard

Optimizers = dict[str, torch.optim.Optimizer]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Build AdamW for trainable parameters, and Muon for a GPT's matrices if `muon_lr` is set.

    Each group of parameters has one role, hence one peak rate (`peak_lr`) and first step
    (`first_step`, from 0), from which its warm-up runs. A step at the peak shrinks every parameter
    of two or more dimensions by the share lr x weight_decay, whatever its group's own rate; others
    have no weight decay.
    """
    groups: dict[tuple[str, str, float], list[nn.Parameter]] = {}
    roles = _Roles(model)
    for name, parameter in trainable(model).items():
        role = roles.of(name, parameter)
        kind = "muon" if role == "matrices" and config.muon_lr is not None else "adamw"
        decay = _decay(parameter, _rate(role, config), config)
        groups.setdefault((kind, role, decay), []).append(parameter)
    optimizers: Optimizers = {}
    for kind in ("adamw", "muon"):
        settings: list[dict[str, Any]] = [
            {
                "params": parameters,
                "role": role,
                "lr": _rate(role, config),
                "peak_lr": _rate(role, config),
                "first_step": 0 if role in _HEARING else config.ctc_only_steps,
                "weight_decay": decay,
            }
            for (of, role, decay), parameters in groups.items()
            if of == kind
        ]
        if settings and kind == "adamw":
            optimizers[kind] = torch.optim.AdamW(settings, betas=config.betas, fused=True)
        elif settings:
            optimizers[kind] = torch.optim.Muon(settings)
    return optimizers


def describe_groups(optimizers: Optimizers) -> list[dict[str, Any]]:
    """Return role, optimizer, rate, weight decay and size of each group, for the run's record."""
    return [
        {
            "role": group["role"],
            "optimizer": kind,
            "lr": group["peak_lr"],
            "weight_decay": group["weight_decay"],
            "first_step": group["first_step"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
        }
        for kind, optimizer in optimizers.items()
        for group in optimizer.param_groups
    ]


RATES = {
    "projector": "projector_lr",
    "mix": "mix_lr",
    "summary": "projector_lr",
    "ctc_head": "lr",
    "adapters": "lora_lr",
    "embeddings": "embedding_lr",
    "unembedding": "unembedding_lr",
    "scalars": "scalar_lr",
    "matrices": "muon_lr",
}
"""Settings of the roles' peak rates; where one is null, `lr` holds, and `_MIX_RATE` for `mix`."""
_MIX_RATE = 0.03
"""Rate of the logits of a mix of layers: Adam moves a logit by about its rate per step, so that at
rates of matrices a run of a thousand steps would end with the weights that it began with."""
_HEARING = ("projector", "mix", "ctc_head")
"""Roles that train from the first step, also while CTC trains alone."""


class _Roles:
    """Roles of a model's parameters, by the modules that hold them."""

    def __init__(self, model: nn.Module) -> None:
        self._by_id: dict[int, str] = {}
        for module in model.modules():
            if isinstance(module, GPT):
                gates = [b.attn.ve_gate for b in module.blocks() if b.attn.ve_gate is not None]
                for gate in (module.smear_gate, *gates):
                    self._by_id[id(gate.weight)] = "scalars"
            if isinstance(module, GPT | HFLanguageModel):
                self._by_id[id(module.head().weight)] = "unembedding"
        # A tied head is the table of embeddings.
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                self._by_id[id(module.weight)] = "embeddings"

    def of(self, name: str, parameter: nn.Parameter) -> str:
        """Return the role of a parameter, a key of `RATES`."""
        if is_adapter(name):
            return "adapters"
        parts = name.split(".")
        if "lm" not in parts:
            return parts[0] if parts[0] in ("ctc_head", "mix", "summary") else "projector"
        return self._by_id.get(id(parameter), "matrices" if parameter.ndim >= 2 else "scalars")


def _rate(role: str, config: OptimConfig) -> float:
    given: float | None = getattr(config, RATES[role])
    usual = _MIX_RATE if role == "mix" else config.lr
    return usual if given is None else given


def _decay(parameter: nn.Parameter, rate: float, config: OptimConfig) -> float:
    """Return the decay that shrinks by lr x weight_decay at the rate of the parameter's group."""
    if parameter.ndim < 2:
        return 0.0
    return config.weight_decay if rate == config.lr else config.weight_decay * config.lr / rate


def rate_share(step: int, config: OptimConfig, first_step: int = 0) -> float:
    """Return the share of the peak rate at `step` (from 0): linear warm-up, then a cosine.

    first_step: step at which parameters begin to train, and their warm-up; zero before it.
    """
    if step < first_step:
        return 0.0
    ramp = 1.0
    if step < first_step + config.warmup_steps:
        ramp = (step - first_step + 1) / config.warmup_steps
    if step < config.warmup_steps:
        return ramp
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return ramp * (config.final_lr + (1 - config.final_lr) * cosine)


def set_rates(optimizers: Optimizers, step: int, config: OptimConfig) -> None:
    """Set the rate of every group for `step` (from 0)."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_share(step, config, group["first_step"])


class WeightAverage:
    """Exponential moving average of the trainable weights.

    The decay at step s is min(decay, (s + 1) / (s + 10)), so that early averages forget the
    initialisation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        current = trainable(model)
        torch._foreach_lerp_(
            list(self.weights.values()), [current[name] for name in self.weights], 1 - decay
        )

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange averaged and current weights; a second call restores them."""
        for name, parameter in trainable(model).items():
            held = self.weights[name].clone()
            self.weights[name].copy_(parameter)
            parameter.copy_(held)


def optimizer_tensors(optimizers: Optimizers, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield optimizer state as (optimizer/parameter/field, tensor), ready for safetensors."""
    names = {id(p): name for name, p in trainable(model).items()}
    for kind, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            for field, value in state.items():
                yield f"{kind}/{names[id(parameter)]}/{field}", torch.as_tensor(value)


class StoredTensors(Protocol):
    """Stored tensors, read one by one (see `omni.checkpoint.tensor_files.TensorFiles`)."""

    shapes: dict[str, tuple[int, ...]]

    def whole(self, name: str) -> Tensor: ...

    def rows(self, name: str, first: int, end: int) -> Tensor: ...


def load_optimizer_tensors(
    optimizers: Optimizers, model: nn.Module, tensors: StoredTensors
) -> None:
    """Load what `optimizer_tensors` yielded, of sharded parameters this rank's rows.

    Other tensors are left out. Raises KeyError for a parameter that its optimizer does not train.
    """
    parameters = trainable(model)
    held = {
        kind: {id(p) for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in optimizers.items()
    }
    for key, shape in tensors.shapes.items():
        kind, name, *fields = key.split("/")
        if not fields:
            continue
        parameter = parameters[name]
        if id(parameter) not in held[kind]:
            raise KeyError(key)
        if shape == tuple(parameter.shape):
            value = like_shard(parameter, functools.partial(tensors.rows, key))
        else:
            value = tensors.whole(key).to(parameter.device, copy=True)
        optimizers[kind].state[parameter][fields[0]] = value
