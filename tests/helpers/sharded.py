"""Small trainings without Ray, by groups of processes that start once for all tests."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from omni.checkpoint.checkpoint import Checkpoint
from omni.checkpoint.resume import newest_checkpoint
from omni.checkpoint.save import Facts, save_checkpoint
from omni.checkpoint.sharded_writer import ShardedCheckpoint, ShardedWriter
from omni.checkpoint.train_state import TrainState
from omni.config import parse_config
from omni.inference.decode_batch import HeldUtterance
from omni.model.batch import Batch
from omni.model.chat_template import AUDIO
from omni.model.lm.lora import LoraShape
from omni.model.lm.pretrained import find_pretrained
from omni.model.speech_lm import OmniConfig
from omni.stream.collate import Utterance
from omni.train.distributed import all_gather, all_sum
from omni.train.evaluation import HeldOut, Layout
from omni.train.lockstep import in_step
from omni.train.model_state import ModelState
from omni.train.other_audio import with_other_audio

BLOCKS = 6  # of a step, over all ranks: equally many for one, two and three
SHAPE = OmniConfig.from_dict(
    {
        "gpt": {"sequence_len": 128, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 64}
        | {"n_kv_head": 2},
        "feature_dim": 8,
        "ctc": True,
    }
)
ADAPTED = ["projector", "lora"]
# What the processes need is imported once, by the server that they are forked from.
_PRELOAD = [__name__, "peft", "transformers.models.llama.modeling_llama"]


class Groups:
    """Trains with groups of up to three processes; a group of one is the calling process."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def train(
        self,
        folder: Path,
        world: int,
        strategy: str,
        steps: int,
        lm: str = "",
        parts: Sequence[str] = ADAPTED,
        **optim: Any,
    ) -> Checkpoint:
        """Train to step `steps` from the newest checkpoint in `folder`, and write one.

        lm: URI of a transformers model, of which `parts` train; empty: a small GPT. optim:
        settings.
        """
        with tempfile.TemporaryDirectory() as meeting:
            job = (world, strategy, steps, str(folder), f"{meeting}/store", lm, parts, optim)
            if world == 1:
                _work(0, *job)
            else:
                self._pool.starmap(_work, [(rank, *job) for rank in range(world)], chunksize=1)
        found = newest_checkpoint(folder)
        assert found is not None and found.state.step == steps
        return found

    def pair(self, world: int, utterances: int, positions: int) -> list[dict[str, str | None]]:
        """Share utterances among ranks and pair them; returns each rank's, by their ids."""
        with tempfile.TemporaryDirectory() as meeting:
            job = (world, f"{meeting}/store", utterances, positions)
            if world == 1:
                return [_pair(0, *job)]
            return self._pool.starmap(_pair, [(rank, *job) for rank in range(world)], chunksize=1)


@contextmanager
def start_groups() -> Iterator[Groups]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with context.Pool(3) as pool:
        yield Groups(pool)


def _work(
    rank: int,
    world: int,
    strategy: str,
    steps: int,
    folder: str,
    store: str,
    lm: str,
    parts: Sequence[str],
    optim: dict[str, Any],
) -> None:
    with _in_group(rank, world, store):
        _train(rank, world, strategy, steps, folder, lm, parts, optim)


@contextmanager
def _in_group(rank: int, world: int, store: str) -> Iterator[None]:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=100),
        )
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()


def _pair(
    rank: int, world: int, store: str, utterances: int, positions: int
) -> dict[str, str | None]:
    """Pair those of bins of two, every `world`-th bin on a rank; features tell whose they are."""
    layout = Layout(positions, stack=1, summary_tokens=0, frame_dim=1)
    held, places = [], []
    for number in range(utterances):
        if number // 2 % world == rank:
            audio = torch.full((number % 5 + 1, 1), float(number))
            utterance = Utterance([audio], [AUDIO, 5, 6], [False, True, True])
            held.append(HeldUtterance(utterance, str(number), f"{number}.wav", ""))
            places.append((number // 2, number % 2))
    with _in_group(rank, world, store):
        paired = with_other_audio(held, places, layout.fits)
    return {
        h.id: None if other is None else str(int((other.features or [])[0][0]))
        for h, other in zip(held, paired, strict=True)
    }


def _train(
    rank: int,
    world: int,
    strategy: str,
    steps: int,
    folder: str,
    lm: str,
    parts: Sequence[str],
    optim: dict[str, Any],
) -> None:
    config = parse_config(
        {
            "train": {"workers": world, "strategy": strategy, "precision": "fp32"},
            "optim": {"ema": 0.9, "lr": 1e-3, "warmup_steps": 0, "steps": 100, "ctc_weight": 0.5}
            | optim,
        }
        | ({"model": {"lm": lm, "train": list(parts)}} if lm else {})
    )
    shape = adapted(lm) if lm else SHAPE
    if lm and "lora" not in parts:
        shape = replace(shape, lora=None)
    found, first = newest_checkpoint(Path(folder)), 0
    trained = ModelState(config, shape, torch.device("cpu"), world, resuming=found is not None)
    assert trained.sharded == (strategy == "fsdp" and world > 1)
    if found is not None:
        trained.load(found)
        first = found.state.step
    for step in range(first, steps):
        _step(trained, step, rank, world)
    weights, rest = trained.snapshot(rank)
    with trained.evaluating() as model, in_step(model), torch.inference_mode():
        # Ranks may evaluate different amounts.
        losses = [float(model(_batch(99, place)).loss) for place in range(rank + 1)]
    with trained.evaluating() as model:
        dev = _held(rank).loss(model)
    assert dev.gap is not None and dev.loss > 0
    state = TrainState(step=steps, best_value=losses[0])
    if trained.sharded:
        writer = ShardedWriter(Path(folder), 9, Log(), rank, all_gather)
        facts = Facts(state, shape, {}, "", "")
        writer.save(ShardedCheckpoint(facts, weights, rest, best=False))
        writer.wait()
        writer.close()
    elif rank == 0:
        save_checkpoint(
            Path(folder),
            state=state,
            model=shape,
            encoder={},
            weights=weights,  # type: ignore[arg-type]
            optimizer=rest,  # type: ignore[arg-type]
            config_yaml="",
            tokenizer_json="",
        )
    if world > 1:
        dist.barrier()


class Log:
    """Receiver of what became of checkpoints; nothing may fail."""

    def log_checkpoint(self, step: int, seconds: float) -> None:
        pass

    def log_failed_checkpoint(self, step: int, reason: str, known: bool) -> None:
        raise AssertionError(reason)


def _step(trained: ModelState, step: int, rank: int, world: int) -> None:
    mine = range(rank, BLOCKS, world)
    tokens = torch.zeros(1, dtype=torch.float64)
    ctc_only = step < trained.config.optim.ctc_only_steps
    for place in mine:
        with trained.accumulating(last=place == mine[-1]):
            batch = _batch(step, place, trained.model.distillation is not None)
            out = trained.losses(batch, ctc_only)
            (out.loss + 0.5 * out.ctc + 0.5 * out.kl).backward()
        tokens += out.tokens
    trained.gradient_norm(float(all_sum(tokens)))
    trained.update(step)


def adapted(lm: str) -> OmniConfig:
    """The same around a language model that is trained already."""
    found = find_pretrained(lm, with_tokenizer=False)
    return OmniConfig(found.shape, 8, source=found.source, lora=LoraShape(4, 8), ctc=True)


def _batch(step: int, place: int, teacher: bool = False) -> Batch:
    numbers = torch.Generator().manual_seed(step * BLOCKS + place)
    frames = torch.randn(60, 8, generator=numbers)
    text = torch.randint(0, 250, (6 + place,), generator=numbers).tolist()
    ids = [AUDIO, 290, *text, 291]
    flags = [False, False] + [True] * (len(text) + 1)
    utterance = Utterance([frames], ids, flags, transcript_tokens=[text])
    return _layout(teacher).batch([[utterance]])


def _layout(teacher: bool = False) -> Layout:
    return Layout(64, SHAPE.stack, 0, 8, teacher, ctc=True)


def _held(rank: int) -> HeldOut:
    """Three utterances of the first rank, a bin each; other ranks have none."""
    held = []
    for n in range(3 if rank == 0 else 0):
        audio, flags = torch.full((60, 8), 0.1 * n), [False, False, True, True]
        utterance = Utterance([audio], [AUDIO, 290, n, 291], flags)
        held.append(HeldUtterance(utterance, str(n), f"{n}.wav", ""))
    places = [(n, 0) for n in range(len(held))]
    layout = Layout(20, SHAPE.stack, 0, 8, ctc=True)
    return HeldOut(held, places, layout, torch.device("cpu"))
