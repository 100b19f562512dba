"""What one of eight ranks holds with FSDP. The other ranks are pretended: a fake process group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import omni.train.build_sharded
import omni.train.model_state
from omni.config import parse_config
from omni.model.batch import Batch
from omni.model.chat_template import AUDIO
from omni.model.shards import local_part
from omni.model.speech_lm import OmniConfig
from omni.stream.collate import Utterance
from omni.train.evaluation import Layout
from omni.train.lockstep import in_step
from omni.train.model_state import ModelState
from tests.helpers.peak_memory import peak_bytes

WORLD = 8
SHAPE = OmniConfig.from_dict(
    {
        "gpt": {"sequence_len": 128, "vocab_size": 304, "n_layer": 6, "n_head": 4, "n_embd": 128}
        | {"n_kv_head": 4},
        "feature_dim": 8,
        "ctc": True,
    }
)


@pytest.fixture(autouse=True)
def pretended_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # In bf16 also where this processor has no instructions for it.
    for module in (omni.train.model_state, omni.train.build_sharded):
        monkeypatch.setattr(module, "compute_dtype", lambda wanted, device: wanted)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def _state(
    precision: str = "bf16",
    train: tuple[str, ...] = ("projector", "lm"),
    shape: OmniConfig = SHAPE,
) -> ModelState:
    config = parse_config(
        {
            "train": {"workers": WORLD, "strategy": "fsdp", "precision": precision},
            "model": {"train": list(train)},
            "optim": {"ctc_weight": 0.5},
        }
    )
    return ModelState(config, shape, torch.device("cpu"), WORLD)


def _batch() -> Batch:
    text = list(range(20))
    ids, flags = [AUDIO, 290, *text, 291], [False, False] + [True] * 21
    utterance = Utterance([torch.zeros(60, 8)], ids, flags, transcript_tokens=[text])
    return Layout(64, SHAPE.stack, 0, 8, ctc=True).batch([[utterance]])


def _backward(state: ModelState) -> None:
    with state.autocast():
        out = state.losses(_batch())
        (out.loss + 0.5 * out.ctc).backward()


def _peak_bytes(state: ModelState) -> int:
    """Measure the memory of a step after the first, which makes the optimizer's state."""
    tracker = FSDPMemTracker(state.model, *state.optimizers.values())
    with tracker:
        for step in range(2):
            tracker.reset_mod_stats()
            _backward(state)
            state.gradient_norm(20.0)
            state.update(step)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return int(peak["Total"])


def test_bf16_keeps_no_copy_of_each_layer() -> None:
    assert _peak_bytes(_state("bf16")) < _peak_bytes(_state("fp32"))


def test_layers_are_gathered_in_bf16_and_their_gradients_are_summed_in_fp32() -> None:
    state = _state()
    seen: set[torch.dtype] = set()
    layer = state.model.lm.shards()[0]
    inside = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    inside.register_forward_pre_hook(lambda module, _: seen.add(module.weight.dtype))
    _backward(state)
    assert seen == {torch.bfloat16}
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


def _whole_bytes(state: ModelState) -> int:
    return sum(p.numel() * p.element_size() for p in state.model.parameters())


def test_no_rank_holds_the_model_while_it_builds_saves_or_evaluates_it() -> None:
    """Bytes that are allocated at once: its eighth, and the tensor or layer that is at work."""
    made: list[ModelState] = []
    built = peak_bytes(lambda: made.append(_state()))
    (state,) = made
    whole = _whole_bytes(state)
    largest = max(p.numel() * p.element_size() for p in state.model.parameters())
    assert whole / WORLD < built < whole / WORLD + 2.5 * largest < whole / 2
    assert peak_bytes(lambda: made.append(state.snapshot())) < whole / WORLD + largest  # type: ignore[func-returns-value,arg-type]
    layers = {id(p) for part in state.model.lm.shards() for p in part.parameters()}
    root = sum(
        p.numel() * p.element_size() for p in state.model.parameters() if id(p) not in layers
    )

    def evaluate() -> None:
        with state.evaluating() as model, in_step(model), torch.inference_mode():
            assert math.isfinite(float(model(_batch()).loss))

    assert peak_bytes(evaluate) < root + whole / 4 < whole
    _backward(state)  # Nothing that evaluation left is in the way of training.


def test_summary_tokens_know_the_first_recordings_on_every_rank() -> None:
    shape = replace(SHAPE, summary_tokens=2)
    state = _state(shape=shape)
    generator = torch.Generator().manual_seed(0)
    text = [1, 2, 3]
    utterances = [
        Utterance(
            [torch.randn(20 + n, 8, generator=generator)],
            [AUDIO, 290, *text, 291],
            [False, False] + [True] * 4,
            transcript_tokens=[text],
        )
        for n in range(3)
    ]
    batch = Layout(64, shape.stack, 2, 8, ctc=True).batch([utterances])
    pool = state.model.summary
    assert pool is not None
    centres = []
    for _ in range(2):
        state.fit_summary([batch])
        with state.autocast():
            out = state.losses(batch)
        (out.loss + out.ctc).backward()
        centres.append(local_part(pool.centre).clone())
    assert math.isfinite(float(out.loss))
    assert len(centres[0]) == 16 / WORLD and (centres[0] != 0).all()
    assert torch.equal(*centres)
    gradients = {name: p.grad for name, p in pool.named_parameters()}
    assert all((grad is None) == (name in ("centre", "gain")) for name, grad in gradients.items())


@pytest.mark.parametrize("train, early", [(("projector",), 0), (("projector", "lm"), 1)])
def test_few_gradients_are_reduced_once_per_step(train: tuple[str, ...], early: int) -> None:
    """Many are reduced with each microbatch: whole, they would be as large as the model."""
    state = _state(train=train)
    counts = []
    for last in (False, True):
        with CommDebugMode() as mode, state.accumulating(last):
            _backward(state)
        counts.append(
            sum(n for op, n in mode.get_comm_counts().items() if "reduce_scatter" in str(op))
        )
    assert (counts[0] > 0) == bool(early)
    assert counts[1] > 0
