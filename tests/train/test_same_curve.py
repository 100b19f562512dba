"""What makes training fast does not change what is learnt: one seed, some steps, two curves."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.audio.windows import SAMPLING_RATE
from omni.config import load_config
from omni.metrics.rows import Window
from omni.run.prepare import Prepared, make_worker_spec, prepare
from omni.run.rates import Trainer, encoder_rate, loaded_blocks, without_cache
from omni.stream.feature_cache import FeatureCache
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import StreamSettings, stream_settings

STEPS, BINS = 12, 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    storage = str(tmp_path_factory.mktemp("runs"))
    small = ["--model.n_layer", "2", "--model.n_embd", "64", "--model.n_head", "2"]
    settings = ["--train.precision", "fp32", "--encoder.dtype", "fp32", "--run.storage", storage]
    steps = ["--optim.warmup_steps", "0", "--optim.bin_positions", "256"]
    return prepare(load_config("configs/scratch.yaml", [*small, *settings, *steps]))


def _blocks(prepared: Prepared, **encoder: Any) -> list[Any]:
    settings = without_cache(stream_settings(prepared.config, prepared.encoder))
    settings = replace(settings, encoder={**settings.encoder, **encoder})
    loaded, _ = loaded_blocks(prepared.splits["train"], range(BINS), settings)
    return encoder_rate(EncodeStage(settings), loaded, 0)[1]


def _curve(prepared: Prepared, blocks: list[Any]) -> torch.Tensor:
    trainer = Trainer(make_worker_spec(prepared), blocks, torch.device("cpu"))
    losses = []
    for _ in range(STEPS):
        trainer._loop.recorder.window = Window()
        trainer.step()
        sums = trainer._loop.recorder.window.sums
        losses.append(sums.loss / sums.tokens)
    assert losses[-1] < losses[0] - 0.5, "it learns"
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module")
def blocks(prepared: Prepared) -> list[Any]:
    return _blocks(prepared)


@pytest.fixture(scope="module")
def reference(prepared: Prepared, blocks: list[Any]) -> torch.Tensor:
    return _curve(prepared, blocks)


def test_batches_of_the_encoder_leave_the_curve_bit_identical(
    prepared: Prepared, reference: torch.Tensor
) -> None:
    assert torch.equal(_curve(prepared, _blocks(prepared, frame_budget=0)), reference)


def test_the_cache_leaves_the_curve_bit_identical(
    prepared: Prepared, reference: torch.Tensor, tmp_path: Path
) -> None:
    plain = stream_settings(prepared.config, prepared.encoder)
    settings: StreamSettings = replace(plain, cache=str(tmp_path))
    stage = EncodeStage(settings)
    split = prepared.splits["train"]
    fresh, _ = loaded_blocks(split, range(BINS), settings)
    for block in fresh:
        stage(block)
    del stage  # writes what it still holds, as at the end of a stream
    cache = FeatureCache(tmp_path)
    rows = [load_bin(split, number, settings, cache) for number in range(BINS)]
    mels = [mel for row in rows for made in row["mels"] for mel in made]
    assert mels and not any(mels), "nothing is left to encode"
    stage = EncodeStage(settings)
    cached = [stage(type(fresh[0]).from_pylist([row], fresh[0].schema)) for row in rows]
    assert torch.equal(_curve(prepared, cached), reference)


def test_padded_encoder_batches_change_rounding_only(
    prepared: Prepared, reference: torch.Tensor
) -> None:
    curve = _curve(prepared, _blocks(prepared, padded=True, frame_budget=4000))
    assert float((curve - reference).abs().max()) < 1e-3


@pytest.mark.parametrize(
    "name, value",
    [
        ("packed_attention.MATMUL_MAX_LENGTH", 0),
        ("packed_attention.GROUP_FILL", 1),
        ("losses.LOGITS_PER_CHUNK", 1 << 13),
    ],
)
def test_attention_and_loss_change_rounding_only(
    prepared: Prepared,
    blocks: list[Any],
    reference: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: int,
) -> None:
    monkeypatch.setattr(f"omni.model.{name}", value)
    assert float((_curve(prepared, blocks) - reference).abs().max()) < 1e-3


def test_only_a_rank_that_waits_for_a_block_is_hurried(
    prepared: Prepared, blocks: list[Any]
) -> None:
    """Asked to stop, a rank at work on a long step finishes it; one without blocks gives up."""
    loop = Trainer(make_worker_spec(prepared), blocks, torch.device("cpu"))._loop
    long_ago = time.perf_counter() - 2 * loop.config.run.grace_seconds
    loop.reader.waiting_since = long_ago
    assert loop._stop_timeout() is None, "nobody asked"
    (loop.run_dir / ".stop").write_text("SIGTERM")
    assert loop._stop_timeout() == loop.config.run.grace_seconds
    loop.reader.waiting_since = None
    assert loop._stop_timeout() is None


def test_a_loader_that_is_held_back_reads_no_faster(prepared: Prepared) -> None:
    config = prepared.config.model_copy(
        update={"data": prepared.config.data.model_copy(update={"loader_rate": 100.0})}
    )
    settings = without_cache(stream_settings(config, prepared.encoder))
    blocks, seconds = loaded_blocks(prepared.splits["train"], range(1), settings)
    audio = (
        sum(sum(row) for block in blocks for row in block["samples"].to_pylist()) / SAMPLING_RATE
    )
    assert seconds >= audio / 100
    assert sum(sum(block["load_seconds"].to_pylist()) for block in blocks) >= audio / 100
