"""Hold the model, optimizers and averaged weights of one rank, replicated or sharded.

With `ddp` every rank holds everything; with `fsdp` (torch's fully_shard) parameters, gradients,
optimizer state and averages are split over the ranks, and a rank holds its shards and the layer
that is at work: the model is built without data, split, and each rank then reads or draws its rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omni.checkpoint.base import initial_weights, read_base
from omni.checkpoint.checkpoint import Checkpoint, CheckpointError
from omni.checkpoint.tensor_files import Rows
from omni.config import Config
from omni.model.batch import Batch
from omni.model.lm.gpt import GPT
from omni.model.lm.pretrained import load_lm
from omni.model.losses import Distillation
from omni.model.precision import compute_dtype
from omni.model.shards import full_tensor, is_sharded, local_part, local_rows, set_rows
from omni.model.speech_lm import LossSums, OmniConfig, OmniModel
from omni.train.build_sharded import build_sharded
from omni.train.distributed import all_sum
from omni.train.lockstep import whole_root
from omni.train.optim import (
    WeightAverage,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_rates,
    trainable,
)

_RAW = "raw/"
"""Prefix of the weights that are trained, where the checkpoint's are an average of them."""
_LITTLE = 0.1
"""Share of the weights that are trained, below which their whole gradients cost little memory."""


class ModelState:
    """Raises SourceError if a pretrained language model cannot be fetched."""

    def __init__(
        self,
        config: Config,
        shape: OmniConfig,
        device: torch.device,
        world: int,
        *,
        tasks: Sequence[str] = ("transcribe",),
        end: int = -1,
        resuming: bool = False,
    ) -> None:
        """tasks: names of the tasks, by number. end: token id that ends an answer. resuming: the
        weights will be loaded, so that those of `model.base` are not needed."""
        self.config, self.device, self.world = config, device, world
        self.sharded = config.train.strategy == "fsdp" and world > 1
        frozen = None if "lm" in config.model.train else self._dtype
        if self.sharded:
            self.model = build_sharded(config, shape, device, world, frozen, resuming)
        else:
            self.model = OmniModel(shape, load_lm(shape, frozen), config.run.seed)
            self.model.init_weights(config.run.seed)
            self.model.train_parts(config.model.train)
        if config.model.base is not None and not resuming:
            self._start_from(config.model.base)
        if len(tasks) > 1:
            known = config.data.tasks
            weights = [known[name].weight if name in known else 1.0 for name in tasks]
            self.model.task_weights = torch.tensor(weights, device=device)
        optim = config.optim
        if optim.kl_weight:
            self.model.distillation = Distillation(optim.kl_temperature, end, optim.kl_end_weight)
        if config.train.recompute:
            self.model.lm.recompute()
        if not self.sharded:
            self.model.to(device)
        if config.train.compile and device.type == "cuda" and not self.sharded:
            compile_layers(self.model)
        self.optimizers = make_optimizers(self.model, config.optim)
        self.average = WeightAverage(self.model, config.optim.ema) if config.optim.ema else None
        self._summary_ready = False
        self._unreduced = False
        """Tell whether the gradients are still those of this rank."""
        self.wrapped: nn.Module = self.model
        if world > 1 and not self.sharded:
            self.wrapped = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _start_from(self, base: str) -> None:
        """Load the weights of another run. Checkpoints leave a frozen published model out."""
        targets = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not self.model.kept_by_reference(name)
        }
        shapes = {name: parameter.shape for name, parameter in targets.items()}
        found = read_base(base)
        if self.model.mix is not None and found.model.layers == 1:
            self.model.mix.begin_at_last()
        with initial_weights(found, shapes) as weights:
            for name in weights.names:
                set_rows(targets[name], functools.partial(weights.files.rows, name))

    # -- a step --------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        wanted = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        return compute_dtype(wanted, self.device)

    def autocast(self) -> torch.autocast:
        enabled = self._dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wrap the backward pass of a microbatch; gradients are reduced after the last one only.

        With FSDP this is so where few weights are trained. Others are reduced each time, since
        their gradients would be as large as the model until then.
        """
        if self.sharded and self._trains_little:
            sharded: Any = self.model
            sharded.set_requires_gradient_sync(last)
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    @functools.cached_property
    def _trains_little(self) -> bool:
        return trains_little(self.model)

    def losses(self, batch: Batch, ctc_only: bool = False) -> LossSums:
        """Run the forward pass.

        ctc_only: leave out the language model, whose parameters then get no gradients. DDP would
        wait for them, so it is not asked; `gradient_norm` sums the others' gradients over ranks.
        """
        self._unreduced = ctc_only and self.wrapped is not self.model
        module = self.model if ctc_only else self.wrapped
        out: LossSums = module(batch, ctc_only)
        return out

    def fit_summary(self, batches: Iterable[Batch]) -> None:
        """Let the summary tokens know the recordings of the first step. A collective call.

        Of the whole step, whose recordings are the same for any number of ranks.
        """
        pool, tokens = self.model.summary, self.model.config.summary_tokens
        if pool is None or self._summary_ready:
            return
        parts = [(b.audio_NF, b.audio_starts_N, len(b.summary_at_M) // tokens) for b in batches]
        self._summary_ready = pool.fit(parts, all_sum)

    def gradient_norm(self, tokens: float) -> float:
        """Divide summed gradients by the global token count and clip; return the norm before."""
        if self._unreduced:
            self._reduce_gradients()
        parameters = list(trainable(self.model).values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        # DDP and FSDP average over ranks, while the loss is a sum over all of them.
        torch._foreach_mul_(gradients, self.world / max(tokens, 1.0))
        return float(full_tensor(nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)))

    def _reduce_gradients(self) -> None:
        """Average the gradients over ranks, as DDP does."""
        gradients = [p.grad for p in trainable(self.model).values() if p.grad is not None]
        summed = all_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(summed / self.world, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        self._unreduced = False

    def update(self, step: int) -> None:
        """Apply the gradients of step `step` (from 0) and update the averaged weights."""
        set_rates(self.optimizers, step, self.config.optim)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.clear_gradients()
        if self.average is not None:
            self.average.update(self.model, step)

    def clear_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        """Rate of the first group of the first optimizer."""
        rate: float = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        return rate

    # -- between steps -------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[OmniModel]:
        """Yield the model in eval mode, under autocast, with averaged weights. Collective.

        A sharded one is sharded still: see `omni.train.lockstep`.
        """
        if self.average is not None:
            self.average.swap(self.model)
        self.model.eval()
        with self.autocast(), whole_root(self.model):
            yield self.model
        # Not after an error, which ends the attempt: a layer may be whole then.
        self.model.train()
        if self.average is not None:
            self.average.swap(self.model)

    def snapshot(self, rank: int = 0) -> tuple[dict[str, Tensor | Rows], dict[str, Tensor | Rows]]:
        """Copy weights (averaged ones) and optimizer state to CPU, for a checkpoint.

        Of sharded tensors, the rows of this rank; of others, all on rank 0 and nothing on the rest.
        Frozen weights of a pretrained model are stored by reference and left out.
        """
        weights = {
            name: p.detach()
            for name, p in self.model.named_parameters()
            if not self.model.kept_by_reference(name)
        }
        rest = dict(optimizer_tensors(self.optimizers, self.model))
        if self.average is not None:
            rest |= {f"{_RAW}{name}": weights[name] for name in self.average.weights}
            weights |= self.average.weights
        return _copied(weights, rank), _copied(rest, rank)

    def load(self, found: Checkpoint) -> None:
        """Load a checkpoint, whatever world size and strategy wrote it."""
        with found.open_optimizer() as rest, found.open_weights() as weights:
            if self.average is not None:
                for name, held in self.average.weights.items():
                    set_rows(held, functools.partial(weights.rows, name))
            raw = {name.removeprefix(_RAW) for name in rest.shapes if name.startswith(_RAW)}
            for name, parameter in self._stored_parameters():
                if name in raw:
                    set_rows(parameter, functools.partial(rest.rows, f"{_RAW}{name}"))
                else:
                    set_rows(parameter, functools.partial(weights.rows, name))
            try:
                load_optimizer_tensors(self.optimizers, self.model, rest)
            except KeyError as error:
                raise CheckpointError(
                    f"{found.path}: optimizer state of {error} does not fit this run; expected the "
                    "optim.muon_lr and model.train that the run began with"
                ) from None

    def load_best(self, found: Checkpoint) -> None:
        """Load the weights of a checkpoint alone, to be evaluated without averaging."""
        self.average = None
        with found.open_weights() as weights:
            for name, parameter in self._stored_parameters():
                set_rows(parameter, functools.partial(weights.rows, name))

    def _stored_parameters(self) -> list[tuple[str, nn.Parameter]]:
        every = self.model.named_parameters()
        return [(name, p) for name, p in every if not self.model.kept_by_reference(name)]


def trains_little(model: nn.Module) -> bool:
    """Tell whether the whole gradients of the trained weights cost little memory."""
    every = list(model.parameters())
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    return trained < _LITTLE * sum(parameter.numel() for parameter in every)


def _copied(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor | Rows]:
    copies: dict[str, Tensor | Rows] = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            first, end = local_rows(tensor)
            if end > first:
                values = local_part(tensor).to("cpu", copy=True)
                copies[name] = Rows(values, first, len(tensor))
        elif rank == 0:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def compile_layers(model: OmniModel) -> None:
    """Compile the layers of a GPT; transformers' models run as they are."""
    if isinstance(model.lm, GPT):
        model.lm.compile_layers()
