"""Estimate the memory of a rank at the peak of a training step, before anything is started.

The model, losses and optimizers of the run make a step on fake tensors, and the storages that are
alive are counted: an estimate takes seconds and no memory, and covers whatever the step does, such
as dropout, recomputation, chunks of logits, the CTC head and the copies that autocast keeps. What
no operator shows is added by arithmetic: shards and gathered layers of FSDP, and a margin for the
allocator. Neither a GPU nor Ray is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omni.config import Config
from omni.model.batch import Batch
from omni.model.lm.lora import is_adapter
from omni.model.losses import Distillation
from omni.model.packed_attention import separate_masks
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.plan.plan import padded_step
from omni.run.fake_step import (
    Device,
    FakeBatch,
    LiveBytes,
    fake_batch,
    fake_parameters,
    tensors_of,
)
from omni.train.model_state import trains_little
from omni.train.optim import WeightAverage, make_optimizers, trainable

MARGIN = 0.1
"""Share of the peak that is added for memory that the caching allocator holds and cannot use."""
CONTEXT_BYTES = 1 << 30
"""Bytes of a GPU that are added for CUDA's context and the workspaces of cuBLAS and NCCL."""
_LAYERS_GATHERED = 3
"""Layers that FSDP holds whole: the one at work, the buffer that it came in, and the next one's."""
_LAYERS_REDUCED = 2
"""Layers whose whole gradients FSDP holds for their reduction: this one's and the last one's."""
_FP32_BYTES = 4
_CHECKPOINTS_HELD = 2
"""Checkpoints of which a rank holds copies: one that is written, and the next."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by kind, at the moment of a step at which their sum is largest.

    host: bytes of tensors in the memory of the node, beside those of a step, that rank 0 holds at
    the worst moment (any rank with FSDP): on a GPU the model while it is built, then the copies of
    two checkpoints that wait for storage; on a CPU these copies.
    """

    kinds: dict[str, int]
    device: Device
    host: int = 0

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the worst moment."""
        return sum(self.kinds.values())

    @property
    def least(self) -> int:
        """Bytes without which the run cannot work: the peak and, on a GPU, what CUDA takes."""
        return self.peak + (CONTEXT_BYTES if self.device == "cuda" else 0)

    @property
    def needed(self) -> int:
        """Bytes to have: `least` and the margin."""
        return self.least + round(self.peak * MARGIN)

    def __str__(self) -> str:
        found = sorted(self.kinds.items(), key=lambda item: -item[1])
        parts = [f"{name} {size_text(size)}" for name, size in found if size >= 1 << 20]
        return f"{', '.join(parts)}; at most {size_text(self.host)} of host memory beside them"


def size_text(size: float) -> str:
    """Format bytes as 71.5 GiB or 312 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def estimate_memory(
    config: Config, shape: OmniConfig, batch: Batch, workers: int, device: Device, tasks: int = 1
) -> Memory:
    """Estimate the memory of one of `workers` ranks.

    batch: a block of the plan, on the CPU; its values are not used, but its shapes and segments
    are. device: where the run trains. tasks: number of its tasks.
    """
    step = _Step(config, shape, workers, device, tasks)
    return step.sharded(batch) if step.is_sharded else step.replicated(batch)


class _Step:
    """A step of one rank on fake tensors. Both estimates change the model; ask for one."""

    def __init__(
        self, config: Config, shape: OmniConfig, workers: int, device: Device, tasks: int
    ) -> None:
        self._config, self._workers, self._device, self._tasks = config, workers, device, tasks
        self.is_sharded = config.train.strategy == "fsdp" and workers > 1
        wanted = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        # GPUs that train multiply bf16.
        on_cpu = device == "cpu"
        self._dtype = compute_dtype(wanted, torch.device("cpu")) if on_cpu else wanted
        optim = config.optim
        rows = padded_step(optim.bins_per_step, workers, optim.bins_per_block)
        self._blocks = rows // (workers * optim.bins_per_block)
        with torch.device("meta"):
            self._model = OmniModel(shape)
        self._model.train_parts(config.model.train)
        if optim.kl_weight:
            self._model.distillation = Distillation(optim.kl_temperature, -1, optim.kl_end_weight)
        if config.train.recompute:
            self._model.lm.recompute()
        self._frozen = shape.source is not None and "lm" not in config.model.train

    def replicated(self, batch: Batch) -> Memory:
        """Estimate a rank that holds the whole model."""
        mode, live = FakeTensorMode(), LiveBytes()
        fake = fake_batch(batch, mode, self._device)
        with separate_masks(), mode, live:
            fake_parameters(self._model, self._dtype_held)
            built = sum(p.numel() * p.element_size() for p in self._model.parameters())
            update, states = self._update(live)
            # Gradients stay where others are added to them, and in the buckets of DDP.
            if self._blocks == 1 and self._workers == 1:
                self._clear_gradients()
            live.restart()
            self._losses(fake, live, lambda p: live.mark("gradients", _gradient(p)))
            found = max(update, live.peak, key=Counter.total)
            del states
        return Memory(self._with_batches(found), self._device, self._host(update, built))

    def sharded(self, batch: Batch) -> Memory:
        """Estimate a rank of FSDP.

        The step runs with layers in the number format that they are gathered in. They and their
        gradients, which FSDP frees one by one, are taken out, and the layers that are whole at a
        time are added. All other parameters (the root of FSDP: embeddings, head, projector) are
        whole from the first forward to the end of the backward pass.
        """
        model, mode = self._model, FakeTensorMode()
        layers = [list(part.parameters()) for part in model.lm.shards()]
        largest = max(sum(p.numel() for p in parameters) for parameters in layers)
        trained = max(sum(p.numel() for p in ps if p.requires_grad) for ps in layers)
        inside = {id(p) for parameters in layers for p in parameters}
        names = {name for name, p in model.named_parameters() if id(p) in inside}
        whole, live = LiveBytes(), LiveBytes()
        fake = fake_batch(batch, mode, self._device)
        with separate_masks(), mode:
            with whole:
                fake_parameters(model, self._dtype_held)
                built = self._built()
                held, states = self._update(whole)
                self._clear_gradients()
                del states
            with live:
                fake_parameters(
                    model,
                    lambda name, p: self._dtype if name in names else self._dtype_held(name, p),
                )
                parameters = dict(model.named_parameters())
                live.mark("root", [p for name, p in parameters.items() if name not in names])
                live.mark(None, [p for name, p in parameters.items() if name in names])
                freed = {id(parameters[name]) for name in names}

                def on_gradient(parameter: Tensor) -> None:
                    if id(parameter) in freed:
                        parameter.grad = None
                    else:
                        live.mark("root gradients", _gradient(parameter))

                live.restart()
                self._losses(fake, live, on_gradient)
        del held["update"]
        shards = Counter({kind: size // self._workers for kind, size in held.items()})
        working, ending = Counter(live.peak), Counter(live.kinds)
        working["gathered layers"] = _LAYERS_GATHERED * largest * self._dtype.itemsize
        # The sum over ranks is made in fp32.
        reduced = _LAYERS_REDUCED * _FP32_BYTES + self._dtype.itemsize
        working["reduced layers"] = reduced * trained
        ending["reduced root"] = live.kinds["root gradients"]
        kinds = shards + max(working, ending, key=Counter.total)
        if self._blocks > 1 and trains_little(model):  # They are reduced after the last block.
            kinds["whole gradients"] = _FP32_BYTES * sum(
                p.numel() for p in trainable(model).values()
            )
        return Memory(self._with_batches(kinds), self._device, self._host(shards, built))

    # -- parts of a step -----------------------------------------------------------------------

    def _dtype_held(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return the number format in which a rank keeps a parameter or buffer."""
        pretrained = name.startswith("lm.") and not is_adapter(name)
        frozen = self._frozen and pretrained and isinstance(tensor, nn.Parameter)
        return self._dtype if frozen else tensor.dtype

    def _update(self, live: LiveBytes) -> tuple[Counter[str], Any]:
        """Update all weights once, which makes the optimizers' state.

        Returns the bytes by kind at the peak, and what holds the state.
        """
        model, optim = self._model, self._config.optim
        live.mark("parameters", [*model.parameters(), *model.buffers()])
        optimizers = make_optimizers(model, optim)
        average = WeightAverage(model, optim.ema) if optim.ema else None
        if average is not None:
            live.mark("averages", average.weights.values())
        for parameter in trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
            live.mark("gradients", [parameter.grad])
        for optimizer in optimizers.values():
            optimizer.step()
        top = live.peak.total()
        for kind, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                states = [x for p in group["params"] for x in optimizer.state[p].values()]
                live.mark(f"{kind} of {group['role']}", filter(torch.is_tensor, states))
        found = Counter(live.kinds)
        found["update"] = top - found.total()
        return found, (optimizers, average)

    def _built(self) -> int:
        """Return the bytes that a rank of FSDP holds on the host while it builds the model.

        One tensor at a time is drawn whole, or the projector.
        """
        every = [p.numel() * p.element_size() for p in self._model.parameters()]
        projector = sum(p.numel() * p.element_size() for p in self._model.projector.parameters())
        return max(*every, projector)

    def _host(self, held: Counter[str], built: int) -> int:
        """Return the bytes on the host; held: those of the weights and optimizers, by kind."""
        model = self._model
        referenced = sum(
            p.numel() * p.element_size()
            for name, p in model.named_parameters()
            if model.kept_by_reference(name)
        ) // (self._workers if self.is_sharded else 1)
        without = held["gradients"] + held["activations"] + held["update"] + referenced
        copies = _CHECKPOINTS_HELD * max(0, held.total() - without)
        return max(built, copies) if self._device == "cuda" else copies

    def _clear_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    def _losses(
        self, fake: FakeBatch, live: LiveBytes, on_gradient: Callable[[Tensor], None]
    ) -> None:
        """Run the losses forward and backward; on_gradient: called with each parameter."""
        optim, model = self._config.optim, self._model
        live.mark("batches", tensors_of(fake))
        if self._tasks > 1:
            model.task_weights = torch.ones(self._tasks)
        for parameter in trainable(model).values():
            parameter.register_post_accumulate_grad_hook(on_gradient)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            out = model(fake)
            total = optim.ce_weight * out.loss + optim.ctc_weight * out.ctc
            if optim.kl_weight:
                total = total + optim.kl_weight * out.kl
            del out
            total.backward()

    def _with_batches(self, kinds: Counter[str]) -> dict[str, int]:
        """Count all blocks of a step: they are copied to the device before the first is used."""
        found = {kind: size for kind, size in kinds.items() if size}
        if "batches" in found:
            found["batches"] *= self._blocks
        return found


def _gradient(parameter: Tensor) -> list[Tensor]:
    return [] if parameter.grad is None else [parameter.grad]
