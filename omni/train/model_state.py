"""What is trained on one rank: model, optimizers and averaged weights, whole or sharded.

With `ddp` every rank holds everything; with `fsdp` (torch's fully_shard) parameters, gradients,
optimizer state and averages are split over the ranks. Checkpoints are the same: full tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from omni.checkpoint.checkpoint import Checkpoint, CheckpointError
from omni.config import Config
from omni.model.lm.pretrained import load_lm
from omni.model.losses import Distillation
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.train.distributed import like, whole
from omni.train.optim import (
    WeightAverage,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    schedule,
    set_rates,
    trainable,
)


class Trained:
    """Raises SourceError where a pretrained language model cannot be had."""

    def __init__(
        self,
        config: Config,
        shape: OmniConfig,
        device: torch.device,
        world: int,
        *,
        tasks: Sequence[str] = ("transcribe",),
        end: int = -1,
    ) -> None:
        """tasks: their names, by number. end: the id that ends an answer."""
        self.config, self.device, self.world = config, device, world
        lm = load_lm(shape, None if "lm" in config.model.train else self._dtype)
        self.model = OmniModel(shape, lm, config.run.seed)
        self.model.init_weights(config.run.seed)
        self.model.train_parts(config.model.train)
        if len(tasks) > 1:
            known = config.data.tasks
            weights = [known[name].weight if name in known else 1.0 for name in tasks]
            self.model.task_weights = torch.tensor(weights)
        optim = config.optim
        if optim.kl_weight:
            self.model.distillation = Distillation(optim.kl_temperature, end, optim.kl_end_weight)
        if config.train.recompute:
            self.model.lm.recompute()
        self.model.to(device)
        self.sharded = config.train.strategy == "fsdp" and world > 1
        if self.sharded:
            mesh = init_device_mesh(device.type, (world,))
            for part in self.model.lm.shards():
                fully_shard(part, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizers = make_optimizers(self.model, config.optim)
        self.average = WeightAverage(self.model, config.optim.ema) if config.optim.ema else None
        self._whole: OmniModel | None = None  # of a sharded model, for evaluation
        self.wrapped: nn.Module = self.model
        if world > 1 and not self.sharded:
            self.wrapped = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    # -- a step --------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        wanted = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        return compute_dtype(wanted, self.device)

    def autocast(self) -> torch.autocast:
        enabled = self._dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the backward of a microbatch: DDP adds up over ranks after the last one only."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def gradient_norm(self, tokens: float) -> float:
        """Divide the summed gradients by the global token count, clip; the norm before clipping."""
        parameters = list(trainable(self.model).values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        # DDP and FSDP average over ranks; the loss is a sum over all of them.
        torch._foreach_mul_(gradients, self.world / max(tokens, 1.0))
        return float(whole(nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)))

    def update(self, step: int) -> None:
        """Optimizer and average, for the step with this number (from 0)."""
        set_rates(self.optimizers, schedule(step, self.config.optim))
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.forget_gradients()
        if self.average is not None:
            self.average.update(self.model, step)

    def forget_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    @property
    def rate(self) -> float:
        rate: float = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        return rate

    # -- between steps -------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[OmniModel]:
        """The model to evaluate: averaged weights, eval mode, autocast. A collective call."""
        model = self.model
        if self.sharded:
            model = self._gathered()
        elif self.average is not None:
            self.average.swap(self.model)
        model.eval()
        try:
            with self.autocast():
                yield model
        finally:
            model.train()
            if not self.sharded and self.average is not None:
                self.average.swap(self.model)

    def _gathered(self) -> OmniModel:
        """A whole copy: ranks decode different numbers of utterances, so sharded layers, which
        meet in collectives, would wait for each other for ever."""
        if self._whole is None:
            self._whole = OmniModel(self.model.config).to(self.device)
            self._whole.task_weights = self.model.task_weights
            self._whole.distillation = self.model.distillation
        averaged = {} if self.average is None else self.average.weights
        with torch.no_grad():
            target = dict(self._whole.named_parameters())
            for name, parameter in self.model.named_parameters():
                target[name].copy_(whole(averaged.get(name, parameter.detach())))
        return self._whole

    def snapshot(self, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies on CPU for a checkpoint: weights (averaged ones), and the rest by name.

        Frozen weights of a pretrained model stay where they came from. A collective call; only
        ranks that `keep` it get the copies.
        """
        weights = {
            name: p.detach()
            for name, p in self.model.named_parameters()
            if not self.model.kept_by_reference(name)
        }
        rest = dict(optimizer_tensors(self.optimizers, self.model))
        if self.average is not None:
            rest |= {f"raw/{name}": weights[name] for name in self.average.weights}
            weights |= self.average.weights
        return _copied(weights, keep), _copied(rest, keep)

    def load(self, found: Checkpoint) -> None:
        """Continue from a checkpoint, of whatever world size and strategy."""
        tensors, weights = found.optimizer(), found.weights()
        raw = {
            k.removeprefix("raw/"): tensors.pop(k) for k in list(tensors) if k.startswith("raw/")
        }
        if self.average is not None:
            for name, held in self.average.weights.items():
                _copy(held, weights[name])
        self.load_weights(weights | raw)
        try:
            load_optimizer_tensors(self.optimizers, self.model, tensors)
        except KeyError as error:
            raise CheckpointError(
                f"{found.path}: there is no place for optimizer state of {error}: optim.muon_lr "
                "and model.train must be those of the run"
            ) from None

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if not self.model.kept_by_reference(name):
                _copy(parameter, weights[name])

    def load_best(self, weights: dict[str, Tensor]) -> None:
        """Final weights, to be evaluated as they are."""
        self.average = None
        self.load_weights(weights)


def _copy(target: Tensor, value: Tensor) -> None:
    target.copy_(like(value, target))


def _copied(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            copies[name] = full.to("cpu", copy=True)
    return copies
