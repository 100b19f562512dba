"""Compare training steps on packed bins and on padded batches of the same utterances.

Padded batches are sorted by length under a budget of padded positions, as a careful trainer makes
them; those in random order are beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from omni.bench.baselines import PaddedBatch, length_batches
from omni.bench.prepared_run import Sample, in_temporary_storage, progress, take_sample
from omni.bench.timing import Ceiling, Result, alternate, describe_machine, median, ratio_of
from omni.config import Config
from omni.errors import ConfigError
from omni.model.batch import Batch
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.stream.codec import DTYPES
from omni.stream.collate import Utterance
from omni.train.model_state import compile_layers
from omni.train.optim import make_optimizers, trainable

_SIZES = {"2 x 128": (2, 128, 2), "6 x 256": (6, 256, 4), "8 x 384": (8, 384, 6)}
_BINS = 16
_CEILING_REPEATS = 10


def bench_train_step(config: Config) -> Result:
    """Run the `train-step` suite on the config's model and on fixed sizes (layers x width)."""
    device = torch.device("cuda" if config.train.gpus else "cpu")
    result = Result("train-step", describe_machine(device, config.train.threads))
    with in_temporary_storage(config) as inside:
        sample = take_sample(inside, _BINS, seconds=0)
    torch.set_num_threads(config.train.threads)
    bins = sample.bins()
    packed = [sample.layout.batch([bin]) for bin in bins]
    members = [u for bin in bins for u in bin]
    batches = {
        "packed": packed,
        "sorted": _sorted_batches(sample, members),
        "random": _random_batches(sample, members),
    }
    _describe(batches, result)
    base, lm = sample.prepared.model, sample.prepared.model.lm
    if not isinstance(lm, GPTConfig) or base.source is not None:
        raise ConfigError(
            "model.lm: expected scratch, since this suite initializes its models from a seed"
        )
    own = (lm.n_layer, lm.n_embd, lm.n_head)
    for name, shape in {"config": own, **_SIZES}.items():
        if name != "config" and shape == own:
            continue
        progress(f"model {name}: {shape[0]} layers of {shape[1]}")
        layers, width, heads = shape
        gpt = replace(lm, n_layer=layers, n_embd=width, n_head=heads, n_kv_head=heads)
        model = replace(base, lm=gpt, projector_hidden=None)
        _compare(name, model, config, batches, device, result)
    return result


def _sorted_batches(sample: Sample, members: list[Utterance]) -> list[Batch]:
    """Batch utterances of similar lengths, with at most the positions of a bin in a batch."""
    lengths = [sample.layout.length(member) for member in members]
    batches = length_batches(lengths, sample.prepared.config.optim.bin_positions)
    return [padded_batch(sample, [members[n] for n in batch]) for batch in batches]


def _random_batches(sample: Sample, members: list[Utterance]) -> list[Batch]:
    """Batch utterances in random order, as many to a batch as a bin holds on average."""
    rows = max(1, round(len(members) / len(sample.bins())))
    order = np.random.default_rng(0).permutation(len(members)).tolist()
    return [
        padded_batch(sample, [members[n] for n in order[i : i + rows]])
        for i in range(0, len(order), rows)
    ]


def padded_batch(sample: Sample, members: list[Utterance]) -> PaddedBatch:
    """Build a batch with one utterance per row, padded to the longest."""
    longest = max(sample.layout.length(member) for member in members)
    rows = [[member] for member in members]
    return PaddedBatch.of(replace(sample.layout, positions=longest).batch(rows))


def _describe(batches: dict[str, list[Batch]], result: Result) -> None:
    for name, some in batches.items():
        shapes = [batch.tokens_BT.numel() for batch in some]
        result.add(f"positions filled, {name}", _filled(some) / sum(shapes), "of all")
    result.notes.append(
        f"{len(batches['packed'])} bins against {len(batches['sorted'])} batches sorted by length "
        f"and {len(batches['random'])} in random order, of the same utterances"
    )


def _filled(batches: list[Batch]) -> int:
    return sum(int((batch.segments_BT > 0).sum()) for batch in batches)


def _compare(
    name: str,
    shape: OmniConfig,
    config: Config,
    batches: dict[str, list[Batch]],
    device: torch.device,
    result: Result,
) -> None:
    """Train models of one shape in turns, on a quarter of the batches of their kind at a time."""
    parameters = 0
    jobs: dict[str, Callable[[], None]] = {}
    saved: dict[str, int] = {}
    done: dict[str, list[int]] = {kind: [] for kind in batches}
    for kind, some in batches.items():
        step = _Step(shape, config, device)
        parameters = step.layer_parameters
        saved[kind] = max(step.activation_bytes(batch) for batch in some)
        # Every fourth, so that each turn has batches of all lengths.
        groups = [some[first::4] for first in range(min(4, len(some)))]
        turns = iter(range(1_000_000))

        def job(
            step: _Step = step,
            groups: list[list[Batch]] = groups,
            kind: str = kind,
            turns: object = turns,
        ) -> None:
            group = groups[next(turns) % len(groups)]  # type: ignore[call-overload]
            for batch in group:
                step(batch)
            done[kind].append(_filled(group))

        jobs[kind] = job
    ceiling = Ceiling(compute_dtype(torch.bfloat16, device), device)
    jobs["matmul"] = lambda: ceiling.multiply(_CEILING_REPEATS)
    taken = alternate(jobs, rounds=8, device=device)
    # Times are per position, so that a turn with fewer utterances does not count as faster.
    per_position = {
        kind: [t / n for t, n in zip(taken[kind], done[kind][1:], strict=True)] for kind in done
    }
    peak = ceiling.flops * _CEILING_REPEATS / median(taken["matmul"])
    for kind in done:
        rate = 1 / median(per_position[kind])
        result.add(f"{name}, {kind}", rate, "positions/s")
        result.add(
            f"{name}, {kind}", 6 * parameters * rate / peak, "MFU", "6 x weights of the layers"
        )
        result.add(f"{name}, {kind}", saved[kind] / 1e6, "MB", "kept for backward, at most")
    key = "" if name == "config" else f".{name.replace(' ', '')}"
    for kind, title in (("sorted", "best"), ("random", "random_padding")):
        result.ratio[f"train_step.vs_{title}{key}"] = ratio_of(per_position, kind, "packed")


class _Step:
    """Train a model on one batch per call, as `TrainLoop` does."""

    def __init__(self, shape: OmniConfig, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._model = OmniModel(shape)
        self._model.init_weights(config.run.seed)
        self._model.to(device).train()
        if device.type == "cuda" and config.train.compile:
            compile_layers(self._model)
        self._optimizers = make_optimizers(self._model, config.optim)

    @property
    def layer_parameters(self) -> int:
        """Count the weights of the layers, without embeddings, projector and output head."""
        assert isinstance(self._model.lm, GPT)
        return sum(p.numel() for p in self._model.lm.transformer.h.parameters())

    def __call__(self, batch: Batch) -> None:
        self._loss(batch).backward()
        nn.utils.clip_grad_norm_(list(trainable(self._model).values()), self._config.optim.clip)
        for optimizer in self._optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def activation_bytes(self, batch: Batch) -> int:
        """Measure the bytes that autograd saves for the backward pass, without parameters."""
        saved_bytes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            loss = self._loss(batch)
        for parameter in self._model.parameters():
            saved_bytes.pop(parameter.untyped_storage().data_ptr(), None)
        del loss
        return sum(saved_bytes.values())

    def _loss(self, batch: Batch) -> Tensor:
        dtype = compute_dtype(DTYPES[self._config.train.precision], self._device)
        bf16 = dtype == torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            out = self._model(batch.to(self._device))
            total: Tensor = out.loss + self._config.optim.ctc_weight * out.ctc
        loss: Tensor = total / out.tokens
        return loss
