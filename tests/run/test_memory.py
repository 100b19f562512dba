"""The memory that a worker is estimated to need, beside what it takes, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from omni.cluster.capacity import Node
from omni.config import Config, load_config, parse_config
from omni.errors import ConfigError
from omni.metrics.throughput import memory_of
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.lora import LoraShape
from omni.model.packed_attention import SegmentLayout
from omni.model.speech_lm import OmniConfig
from omni.run import gpu_memory
from omni.run.fake_step import LiveBytes
from omni.run.gpu_memory import Gpu, check_memory, memory_share, named_gpus
from omni.run.memory import Memory, estimate_memory, size_text
from omni.run.prepare import Prepared
from tests.helpers.peak_memory import (
    case,
    estimated_peak,
    llama,
    measured_peak,
    shipped_case,
)
from tests.helpers.worker_specs import encoded_block, small_run

CONFIGS = Path(__file__).parents[2] / "configs"
GPT = OmniConfig(GPTConfig(512, 512, 2, 2, 2, 128), 64, ctc=True, dropout=0.1, audio_dropout=0.1)
LLAMA = OmniConfig(llama(2, 128, 4096), 64, projector="swiglu", ctc=True, lora=LoraShape(8, 16))
SMALL = {
    "averages, two blocks": case(GPT, optim={"ema": 0.9, "bins_per_step": 2}),
    "muon": case(GPT, optim={"bins_per_step": 1, "muon_lr": 0.01}),
    "lora, recompute": case(
        LLAMA,
        model={"lm": "hf:x", "train": ["projector", "lora"]},
        optim={"bins_per_step": 1},
        train={"recompute": True},
    ),
}
SLOW = ("muon", "lora, recompute")
"""Each takes seconds: a CPU multiplies bf16 slowly, and transformers is imported."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SMALL]
)
def test_the_estimate_is_within_a_fifth_of_what_is_measured(name: str) -> None:
    estimated = estimated_peak(SMALL[name])
    # Masks are cached: those of the estimate have no data.
    layout = SegmentLayout.packed(torch.ones(1, 8, dtype=torch.int64), kernel="groups")
    x = torch.randn(1, 8, 1, 4)
    assert torch.isfinite(layout.attend(x, x, x, 8)).all()
    assert estimated == pytest.approx(measured_peak(SMALL[name]), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("llm-*.yaml")), ids=lambda path: path.stem)
def test_configs_say_the_memory_that_their_workers_need(path: Path) -> None:
    """The comment has the need and the GPU: `# memory: 12.3 GiB of a GPU of 24 GiB`."""
    said = re.search(
        r"^# memory: ([\d.]+) GiB of a GPU of (\d+) GiB", path.read_text(), re.MULTILINE
    )
    assert said is not None
    of = shipped_case(load_config(path))
    block = of.batch(seconds=10.0, tokens=30)
    memory = estimate_memory(of.config, of.shape, block, of.world, "cuda")
    assert float(said[1]) == pytest.approx(memory.needed / 2**30, rel=0.03)
    assert memory.needed < int(said[2]) * 2**30 * memory_share(of.config)


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_the_estimate_of_a_shard_is_within_a_fifth(eight_ranks: None) -> None:
    of = case(GPT, optim={"bins_per_step": 8}, train={"workers": 8, "strategy": "fsdp"})
    assert estimated_peak(of) == pytest.approx(measured_peak(of), rel=0.2)


def test_live_bytes_know_kinds_and_the_worst_moment() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(256)
        live.mark("kept", [kept, kept[:8]])
        once = torch.zeros(1024) + 1
        del once
        view = kept.view(16, 16)
    assert dict(live.kinds) == {"kept": 1024, "activations": 0}
    assert live.peak["kept"] == 1024 and live.peak["activations"] == 2 * 4096
    del kept, view
    assert live.kinds.total() == 0


# -- the GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("NVIDIA H100 80GB HBM3", 80),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("A100-40G", 40),
        ("A100", 80),
        ("L4", 24),
        ("L40S", 48),
        ("TPU-V4", None),
    ],
)
def test_the_memory_of_a_gpu_is_known_by_its_name(name: str, size: int | None) -> None:
    assert memory_of(name) == (None if size is None else size << 30)


def test_gpus_of_nodes_that_workers_may_use_are_found_by_ray_names() -> None:
    nodes = [
        Node("a", {"GPU": 8, "accelerator_type:A100": 1}, labels={"pool": "trainer"}),
        Node("b", {"GPU": 1, "accelerator_type:L4": 1}, labels={"pool": "encoder"}),
        Node("c", {"GPU": 1, "accelerator_type:TPU-V4": 1}, labels={"pool": "trainer"}),
        Node("d", {"CPU": 4, "accelerator_type:A10G": 1}, labels={"pool": "trainer"}),
    ]
    assert named_gpus(nodes, {"pool": "trainer"}) == [Gpu("A100", 80 << 30)]
    assert [gpu.name for gpu in named_gpus(nodes, {})] == ["A100", "L4"]


@pytest.mark.parametrize(
    ("train", "share"), [({"gpus": 1}, 1), ({"gpus": 0.75}, 0.75), ({"gpu_memory": 0.6}, 0.6)]
)
def test_a_worker_has_its_share_of_a_gpu(train: dict[str, float], share: float) -> None:
    assert memory_share(parse_config({"train": {"gpus": 0.75} | train})) == share


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Prepared, pa.Table]:
    """A run that asks for a GPU, and its first block."""
    prepared = small_run()
    train = prepared.config.train.model_copy(update={"gpus": 1})
    config: Config = prepared.config.model_copy(update={"train": train})
    return replace(prepared, config=config), encoded_block(
        prepared, prepared.splits["train"], [0, 1]
    )


def test_what_fits_is_one_line_and_what_does_not_names_the_settings(
    on_gpu: tuple[Prepared, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[Memory] = []
    room = [80 << 30]
    monkeypatch.setattr(gpu_memory, "find_gpu", lambda config: Gpu("H100", room[0]))
    known: dict[tuple[bool, int], Memory] = {}

    def estimate(config: Config, *rest: Any) -> Memory:
        key = config.train.recompute, config.optim.bins_per_block
        if key not in known:
            known[key] = estimate_memory(config, *rest)
        needed.append(known[key])
        return known[key]

    monkeypatch.setattr(gpu_memory, "estimate_memory", estimate)
    line = check_memory(*on_gpu)
    assert "\n" not in line and size_text(needed[0].needed) in line and "80.0 GiB of H100" in line
    assert "tight" not in line
    room[0] = needed[0].least
    assert "tight" in check_memory(*on_gpu)
    needed.clear()
    room[0] = 0
    with pytest.raises(ConfigError, match=r"^train\.recompute, optim\.bins_per_block: ") as got:
        check_memory(*on_gpu)
    whole, recomputed, one = needed
    assert whole.peak > recomputed.peak > one.peak > 0
    assert re.search(r"optim\.bin_positions.*model\.train.*model\.lm", str(got.value))
    room[0] = one.least
    with pytest.raises(ConfigError) as got:
        check_memory(*on_gpu)
    assert str(got.value).endswith(
        f"expected train.recompute true and optim.bins_per_block 1 ({size_text(one.needed)})"
    )
    assert "\n" not in str(got.value)
    monkeypatch.setattr(gpu_memory, "find_gpu", lambda config: None)
    assert str(whole) in check_memory(*on_gpu), "no GPU is known: the need is shown"
