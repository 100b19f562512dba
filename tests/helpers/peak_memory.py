"""Measured peak memory of a training step on CPU, beside the estimate.

`python -m tests.helpers.peak_memory` prints the table of docs/cluster.md, each shape measured in a
process of its own. torch's allocator reports every allocation and release to the profiler, kernels'
own buffers included; the peak is the largest sum of them from building the model to the second
update. Nothing of the estimate is used.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from omni.config import Config, parse_config
from omni.model.batch import Batch
from omni.model.chat_template import AUDIO
from omni.model.lm.gpt_block import GPTConfig
from omni.model.lm.hf import HFConfig
from omni.model.lm.lora import LoraShape
from omni.model.speech_lm import LMSource, OmniConfig
from omni.run.memory import estimate_memory, size_text
from omni.stream.collate import Utterance
from omni.train.evaluation import Layout
from omni.train.model_state import ModelState


@dataclass(frozen=True)
class Case:
    """A config and the shape of its model."""

    config: Config
    shape: OmniConfig

    @property
    def world(self) -> int:
        return self.config.train.least

    def batch(self, seconds: float = 2.4, tokens: int = 20) -> Batch:
        return speech_block(self.config, self.shape, seconds, tokens)


def speech_block(config: Config, shape: OmniConfig, seconds: float, tokens: int) -> Batch:
    """A block of full bins of utterances that last `seconds` and have `tokens` text tokens."""
    frames = int(50 * seconds)
    text = [n % 250 for n in range(tokens)]
    features = torch.zeros(frames, shape.frame_dim, dtype=torch.bfloat16)
    ids, flags = [AUDIO, 5, *text, 3], [False, False, *[True] * tokens, True]
    said = Utterance([features], ids, flags, transcript_tokens=[text])
    count = config.optim.bin_positions // (-(-frames // shape.stack) + tokens + 2)
    return Layout.of(config, shape).batch([[said] * count] * config.optim.bins_per_block)


def llama(layers: int, width: int, vocabulary: int) -> HFConfig:
    """A Llama with the proportions of SmolLM2."""
    return HFConfig(
        {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": max(1, width // 192),
            "vocab_size": vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }
    )


_QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
PUBLIC: dict[str, dict[str, Any]] = {
    "hf:Qwen/Qwen3-8B": _QWEN3_8B,
    "hf:Qwen/Qwen3-1.7B": {
        **_QWEN3_8B,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}
"""Shapes of the models that configs name, as in the config.json of each."""
_TURBO_WIDTH = 1280  # d_model of openai/whisper-large-v3-turbo


def shipped_case(config: Config, layers: int | None = None) -> Case:
    """A config of omni with its public model; layers: fewer of them."""
    m, architecture = config.model, dict(PUBLIC[config.model.lm])
    if layers is not None:
        architecture["num_hidden_layers"] = layers
    lora = LoraShape(m.lora_rank, m.lora_alpha or 2 * m.lora_rank)
    shape = OmniConfig(
        HFConfig(architecture),
        _TURBO_WIDTH,
        stack=m.stack,
        projector="swiglu",
        projector_hidden=m.projector_hidden,
        ctc=config.optim.ctc_weight > 0,
        source=LMSource(m.lm, ""),
        lora=lora if "lora" in m.train else None,
    )
    return Case(config, shape)


def case(shape: OmniConfig, **sections: dict[str, Any]) -> Case:
    """A case with CTC and bins of 512 positions, but for what `sections` say."""
    values: dict[str, dict[str, Any]] = {"optim": {"ctc_weight": 1.0, "bin_positions": 512}}
    for section, fields in sections.items():
        values.setdefault(section, {}).update(fields)
    return Case(parse_config(values), shape)


_GPT = GPTConfig(2048, 4096, 12, 8, 8, 512)
_ONE = {"bins_per_step": 1}
_LORA = {"lm": "hf:x", "train": ["projector", "lora"]}
CASES: dict[str, Callable[[], Case]] = {
    "GPT 6 x 256 (configs/scratch.yaml), 2 blocks a step, EMA": lambda: case(
        OmniConfig(
            GPTConfig(2048, 512, 6, 4, 4, 256),
            384,
            ctc=True,
            dropout=0.1,
            token_dropout=0.2,
            audio_dropout=0.15,
        ),
        optim={"ema": 0.99},
    ),
    "GPT 12 x 512": lambda: case(OmniConfig(_GPT, 384, ctc=True, dropout=0.1), optim=_ONE),
    "GPT 12 x 512, `train.recompute`": lambda: case(
        OmniConfig(_GPT, 384, ctc=True, dropout=0.1), optim=_ONE, train={"recompute": True}
    ),
    "Llama 12 x 576 (vocabulary of SmolLM2), LoRA": lambda: case(
        OmniConfig(
            llama(12, 576, 49152),
            384,
            stack=8,
            projector="swiglu",
            projector_hidden=1024,
            ctc=True,
            lora=LoraShape(16, 32),
        ),
        model=_LORA,
    ),
    "GPT 12 x 512, one of 8 ranks of `fsdp`": lambda: case(
        OmniConfig(_GPT, 384, ctc=True, dropout=0.1),
        optim={"bins_per_step": 8},
        train={"workers": 8, "strategy": "fsdp"},
    ),
}


def estimated_peak(of: Case) -> int:
    """Bytes of the worst moment of a step; evaluations are not measured."""
    memory = estimate_memory(of.config, of.shape, of.batch(), of.world, "cpu")
    return sum(memory.kinds.values())


def measured_peak(of: Case) -> int:
    """Measure the peak of two steps. With several ranks, a process group must be there."""
    config, batch = of.config, of.batch()
    blocks = config.optim.bins_per_step // (of.world * config.optim.bins_per_block)

    def train() -> None:
        state = ModelState(config, of.shape, torch.device("cpu"), of.world)
        state.model.train()
        for step in range(2):
            for block in range(blocks):
                with state.accumulating(last=block == blocks - 1), state.autocast():
                    out = state.losses(batch)
                    total = out.loss + out.ctc
                    del out
                    total.backward()
                    del total
            state.gradient_norm(20.0)
            state.update(step)

    return peak_bytes(train) + sum(
        x.untyped_storage().nbytes() for x in vars(batch).values() if isinstance(x, torch.Tensor)
    )


def peak_bytes(run: Callable[[], None]) -> int:
    """Return the largest sum of the bytes that `run` allocates and has not released."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


def _row(name: str) -> str:
    of = CASES[name]()
    estimated = estimated_peak(of)
    if of.world > 1:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=of.world, store=FakeStore())
    measured = measured_peak(of)
    return (
        f"| {name} | {size_text(estimated)} | {size_text(measured)} | {estimated / measured:.2f} |"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_row(sys.argv[1]))
    else:
        for shape in CASES:
            subprocess.run([sys.executable, "-m", "tests.helpers.peak_memory", shape], check=True)
