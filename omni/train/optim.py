"""Build optimizers, schedule their learning rates, average weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from omni.config import OptimConfig
from omni.model.lm.lora import is_adapter
from omni.train.distributed import shard_like

Optimizers = dict[str, torch.optim.Optimizer]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Build AdamW for trainable parameters, and Muon for the GPT's matrices if `muon_lr` is set.

    Scalars, gates and biases get no weight decay. Each group keeps its peak rate as `peak_lr`.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    matrices: list[Tensor] = []
    for name, parameter in trainable(model).items():
        if config.muon_lr is not None and name.startswith("lm.transformer.h.") and _is_matrix(name):
            matrices.append(parameter)
            continue
        decay = config.weight_decay if parameter.ndim >= 2 and _is_matrix(name) else 0.0
        rate = _rate(name, config)
        groups.setdefault((rate, decay), []).append(parameter)
    optimizers: Optimizers = {}
    if groups:
        optimizers["adamw"] = torch.optim.AdamW(
            [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            betas=config.betas,
            fused=True,
        )
    if matrices and config.muon_lr is not None:
        optimizers["muon"] = torch.optim.Muon(
            matrices, lr=config.muon_lr, weight_decay=config.weight_decay
        )
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _rate(name: str, config: OptimConfig) -> float:
    if name.startswith(("projector.", "mix.")) and config.projector_lr is not None:
        return config.projector_lr
    if is_adapter(name) and config.lora_lr is not None:
        return config.lora_lr
    return config.lr


def _is_matrix(name: str) -> bool:
    return "gate" not in name and not name.endswith("bias")


def rate_share(step: int, config: OptimConfig) -> float:
    """Return the share of the peak rate at `step` (from 0): linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizers: Optimizers, share: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


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


def load_optimizer_tensors(
    optimizers: Optimizers, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Load what `optimizer_tensors` yielded. Raises KeyError for an unknown parameter."""
    parameters = trainable(model)
    for key, value in tensors.items():
        kind, name, field = key.split("/")
        parameter = parameters[name]
        optimizers[kind].state[parameter][field] = shard_like(value, parameter)
