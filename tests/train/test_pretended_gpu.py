"""A step of every config on a pretended GPU: no mixed devices, and two waits of the host.

Covered are the encoder, collating, both language models, adapters, distillation, mixed layers, CTC
and its beam search, optimizers and averages, DDP's reducer and buckets, and generating greedily, by
beams and by drawing. A build of torch without CUDA cannot show:

- FSDP: `fully_shard` asks `torch.cuda` for a device, streams and events, which raise in such a
  build. Sharded steps run on a CPU, with a pretended group, in test_sharding.py.
- The kernel of flex attention, which is compiled for a GPU: its operands are checked, and the block
  mask's function gives the result.
- CUDA's own lists of operators for autocast: those of the CPU are used.
- Compiled layers, and NCCL: DDP's buckets are averaged by a hook instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from omni.checkpoint.train_state import TrainState
from omni.config import Config, parse_config
from omni.metrics.table import StepSums
from omni.metrics.throughput import Stopwatch
from omni.model.chat_template import AUDIO
from omni.model.ctc_beam import prefix_beam_search
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.lm.generate import Finished, Generator
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFConfig, HFLanguageModel
from omni.model.lm.lora import LoraShape
from omni.model.lm.prompts import EmbeddedPrompt, embed_prompt
from omni.model.lm.sampling import GREEDY, Sampling
from omni.model.speech_lm import OmniConfig
from omni.stream.collate import Utterance
from omni.train.batches import Microbatch
from omni.train.evaluation import Layout
from omni.train.model_state import ModelState
from omni.train.step import StepRunner
from tests.helpers.hf_folders import VOCABULARY, wrapped
from tests.helpers.pretended_gpu import GPU, Gpu, GpuTensor, MixedDevices

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MICROBATCHES = 2
WAITS = {"copy to the host": 1, "item": 1}
"""Of a step: the sums of its losses, and the gradient norm."""


def _small(path: Path, changes: dict[str, dict[str, Any]]) -> Config:
    """A config with its structure, and small numbers."""
    values = yaml.safe_load(path.read_text())
    small: dict[str, dict[str, Any]] = {
        "data": {"train": ["embedded:train"], "dev": ["embedded:dev"]},
        "encoder": {"weights": "embedded"},
        "optim": {"bin_positions": 64, "steps": 4, "ctc_only_steps": 0},
        "train": {"compile": False},  # Compilers know nothing of a GPU that is not there.
    }
    if values["model"].get("lm") is None:
        small["model"] = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "base": None}
    for section, fields in [*small.items(), *changes.items()]:
        values.setdefault(section, {}).update(fields)
    return parse_config(values)


def _shape(config: Config, layers: int) -> OmniConfig:
    m = config.model
    lm: GPTConfig | HFConfig
    if m.lm == "scratch":
        lm = GPTConfig(64, VOCABULARY, m.n_layer, m.n_head, m.n_kv_head or m.n_head, m.n_embd)
        lm = replace(lm, window_pattern=m.window_pattern)
    else:
        lm = wrapped("llama").config
    return OmniConfig(
        lm=lm,
        feature_dim=384,
        layers=layers,
        stack=m.stack,
        projector=m.projector or ("mlp" if m.lm == "scratch" else "swiglu"),
        projector_hidden=m.projector_hidden and 48,
        dropout=m.dropout,
        token_dropout=m.token_dropout,
        audio_dropout=m.audio_dropout,
        ctc=config.optim.ctc_weight > 0,
        lora=LoraShape(4, 8, ()) if "lora" in m.train else None,
    )


class _Bins:
    """Microbatches of the same bins on the GPU, as `BlockReader` gives them."""

    def __init__(self, layout: Layout, utterances: list[Utterance], rows: int) -> None:
        self.layout, self.bins = layout, [utterances] * rows

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        for block in range(MICROBATCHES):
            counts = StepSums(utterances=sum(map(len, self.bins)))
            yield Microbatch(self.layout.batch(self.bins).to(GPU), block, counts)


def _utterances(features: list[Tensor]) -> list[Utterance]:
    said = ([11, 12, 13, 14], [21, 22, 23])
    return [
        Utterance([part], [5, AUDIO, *text, 3], [False, False, *[True] * len(text), True],
                  number=n, task=0, transcription=True, transcript_tokens=[text])
        for n, (part, text) in enumerate(zip(features, said, strict=True))
    ]  # fmt: skip


def _reduced(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Hand back a bucket of gradients, as the average over ranks that have the same ones."""
    assert isinstance(bucket.buffer(), GpuTensor)
    found: torch.futures.Future[Tensor] = torch.futures.Future()
    found.set_result(bucket.buffer())
    return found


def _step(
    config: Config, gpu: Gpu, steps: int, world: int = 1
) -> tuple[ModelState, list[dict[str, int]]]:
    """Run steps of a config; return what each made the host wait for."""
    layers = len(config.encoder.layers) if isinstance(config.encoder.layers, list) else 1
    shape = _shape(config, layers)
    tasks = ["transcribe", *(name for name in config.data.tasks if name != "transcribe")]
    state = ModelState(config, shape, GPU, world, tasks=tasks, end=3)
    if world > 1:
        state.wrapped.register_comm_hook(None, lambda _, bucket: _reduced(bucket))  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(n, shape.frame_dim, generator=generator) for n in (75, 60)]
    reader: Any = _Bins(Layout.of(config, shape), _utterances(features), 2)

    def fail(event: str, step: int | None = None, **facts: Any) -> None:
        raise AssertionError(f"{event}: {facts}")

    watch = Stopwatch(torch.device("cpu"))
    runner = StepRunner(config, state, reader, lambda: False, fail, watch)
    waits = []
    for number in range(steps):
        gpu.waits.clear()
        result = runner.run(TrainState(step=number))
        assert result.updated and result.norm > 0
        waits.append(dict(gpu.waits))
    return state, waits


VARIANTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    **{path.stem: (path.stem, {}) for path in CONFIGS},
    "layer mix, conv, muon, recompute": ("gpu1", {
        "encoder": {"layers": [0, 2, 4]},
        "model": {"projector": "conv"},
        "optim": {"muon_lr": 0.01},
        "train": {"recompute": True},
    }),
    "windows, tasks": ("gpu8", {
        "model": {"window_pattern": "SL"},
        "data": {"tasks": {"transcribe": {"weight": 2.0}, "say": {}}},
    }),
    "distillation, recompute": ("smollm2", {
        "model": {"train": ["projector", "lora"]},
        "optim": {"kl_weight": 1.0},
        "train": {"recompute": True},
    }),
    "CTC alone": ("scratch", {"optim": {"ctc_only_steps": 4}}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_waits_twice_and_mixes_nothing(name: str) -> None:
    file, changes = VARIANTS[name]
    [path] = [p for p in CONFIGS if p.stem == file]
    config = _small(path, changes)
    steps = 2 if name == "scratch" else 1
    with Gpu() as gpu:
        state, waits = _step(config, gpu, steps)
        assert waits == [WAITS] * steps
        assert gpu.operations > 100
        trained = [p for p in state.model.parameters() if p.requires_grad]
        assert all(isinstance(p, GpuTensor) for p in state.model.parameters())
        held = [s for o in state.optimizers.values() for p in o.state for s in o.state[p].values()]
        assert trained and all(isinstance(x, GpuTensor) for x in held if x.dim())


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group that moves no data; the gradients of its other rank are the same."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    verify = dist._verify_params_across_processes

    def compare(*arguments: Any) -> None:
        """DDP compares shapes in memory of the host, which it reads without torch's operators."""
        with Gpu.here().frame(False):
            verify(*arguments)

    monkeypatch.setattr(dist, "_verify_params_across_processes", compare)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("file", ["scratch", "smollm2"])
def test_two_ranks_of_ddp_wait_no_more(file: str, two_ranks: None) -> None:
    """Gradients lie in buckets on the GPU. Sums over ranks travel by way of the host with gloo."""
    [path] = [p for p in CONFIGS if p.stem == file]
    config = _small(path, {"train": {"workers": 2, "compile": False}})
    with Gpu() as gpu, gpu.frame(True):
        # Before the second step, DDP orders its buckets anew in memory that it reads itself.
        state, waits = _step(config, gpu, 1, world=2)
        assert isinstance(state.wrapped, nn.parallel.DistributedDataParallel)
        assert waits == [WAITS]
        assert all(isinstance(p, GpuTensor) for p in state.model.parameters())


@pytest.mark.parametrize(("mode", "layers"), [("trim", "last"), ("full", [0, 2, 4])])
def test_the_encoder_waits_for_nothing(mode: Any, layers: Any) -> None:
    rng = np.random.default_rng(0)
    audio = [rng.normal(0, 0.1, n).astype(np.float32) for n in (20_000, 16_000)]
    with Gpu() as gpu:
        arguments = {"mode": mode, "layers": layers, "dtype": torch.float32}
        encoder = WhisperEncoder("embedded", device=GPU, **arguments)
        assert encoder.padded
        gpu.waits.clear()
        found = encoder.encode(audio[: 1 if mode == "full" else 2])
        assert not gpu.waits and all(isinstance(part, GpuTensor) for part in found)
        features = [part.cpu() for part in found]
    reference = WhisperEncoder("embedded", **arguments).encode(audio[: len(found)])
    for one, other in zip(features, reference, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


WRITING: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "greedy": ({}, {"tolist": 1}),
    "kept": ({"keep": True}, {"tolist": 1}),
    "drawn": ({"sampling": Sampling(0.7, 0.9)}, {"tolist": 1, "tensor": 2}),
    "beam": ({"beam": 2}, {"tolist": 2, "tensor": 3}),
}
"""Ways of writing answers, and what each token of all answers makes the host wait for: the token,
the rows and their random numbers, and the places, parents and tokens of hypotheses."""


def _write(
    lm: GPT | HFLanguageModel,
    prompts: list[EmbeddedPrompt],
    tokens: int,
    sampling: Sampling = GREEDY,
    **settings: Any,
) -> list[Finished]:
    generator = Generator(lm, -5, **settings)
    for key, prompt in enumerate(prompts):
        generator.add(key, prompt, tokens, sampling)
    found: list[Finished] = []
    while generator.active or generator.waiting:
        found += generator.step()
    return found


@pytest.mark.parametrize("file", ["scratch", "smollm2"])
def test_generating_waits_seldom(file: str) -> None:
    """The host waits once per token of all answers, for the tokens; drawing and beams wait more."""
    [path] = [p for p in CONFIGS if p.stem == file]
    config = _small(path, {})
    features = [[torch.randn(n, 384)] for n in (75, 60)]
    with Gpu() as gpu:
        state = ModelState(config, _shape(config, 1), GPU, 1, end=3)
        state.model.eval()
        with torch.inference_mode():
            prompts = [
                embed_prompt(state.model, ids, recordings)
                for ids, recordings in zip([[5, AUDIO], [5, 6, AUDIO]], features, strict=True)
            ]
        for name, (settings, expected) in WRITING.items():
            waits = []
            for tokens in (2, 6):
                gpu.waits.clear()
                found = _write(state.model.lm, prompts, tokens, **settings)
                assert [len(f.answer.ids) for f in found] == [tokens, tokens]
                waits.append(Counter(gpu.waits))
            each = {what: count / 4 for what, count in (waits[1] - waits[0]).items()}
            assert each.keys() == expected.keys(), name
            assert all(each[what] <= most for what, most in expected.items()), (name, each)


def test_the_beam_search_of_ctc_waits_after_the_last_frame() -> None:
    waits = []
    with Gpu() as gpu:
        for frames in (5, 20):
            log_probs = torch.randn(2, frames, 9).log_softmax(-1).to(GPU)
            gpu.waits.clear()
            found = prefix_beam_search(log_probs, [frames, 3], beam=4, labels_per_frame=4)
            assert len(found) == 2 and found[0]
            waits.append(dict(gpu.waits))
    assert waits == [{"tensor": 1, "tolist": 3}] * 2


def test_a_tensor_of_the_host_is_refused_and_waits_are_counted() -> None:
    """What the tests above would show, if it happened."""
    with Gpu() as gpu:
        x, y = torch.ones(3, requires_grad=True).to(GPU), torch.ones(3)
        for mixed in (
            lambda: x * y,
            lambda: y.add_(x),
            lambda: torch.cat([x, y]),
            lambda: x[y > 0],
        ):
            with pytest.raises(MixedDevices):
                mixed()
        assert (x * torch.tensor(2.0)).device.type == "cuda", "a number may come from the host"
        gpu.waits.clear()
        float(x.detach()[0]), x.cpu(), (x > 0).nonzero(), x[x > 0], x.tolist(), y.to(GPU)
        y.pin_memory().to(GPU, non_blocking=True)
        assert gpu.waits == {
            "item": 1, "copy to the host": 1, "nonzero": 1, "index by a mask": 1, "tolist": 1,
            "copy from the host": 1,
        }  # fmt: skip
        assert torch.zeros(2, device=x.device).is_cuda and torch.zeros_like(x).is_cuda
        assert not torch.zeros(2).is_cuda
