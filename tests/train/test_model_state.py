"""Whole and sharded training are the same training, and continue each other's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni.checkpoint.checkpoint import Checkpoint
from omni.config import parse_config
from omni.model.lm.lora import is_adapter
from omni.train.model_state import ModelState
from tests.helpers.hf_folders import save_folder
from tests.helpers.sharded import SHAPE, Groups, start_groups


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with start_groups() as started:
        yield started


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, groups: Groups) -> Checkpoint:
    return groups.train(tmp_path_factory.mktemp("whole"), 1, "ddp", 4)


def _assert_same_weights(found: Checkpoint, whole: Checkpoint, atol: float = 1e-4) -> None:
    weights, expected = found.weights(), whole.weights()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("parts", [[(2, "fsdp"), (1, "ddp")], [(2, "ddp"), (3, "fsdp")]])
def test_any_strategy_continues_any_other(
    groups: Groups, whole: Checkpoint, tmp_path: Path, parts: list[tuple[int, str]]
) -> None:
    for number, (world, strategy) in enumerate(parts, start=1):
        found = groups.train(tmp_path, world, strategy, 2 * number)
    _assert_same_weights(found, whole)
    state, expected = found.optimizer(), whole.optimizer()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].shape == value.shape
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4)
    assert whole.state.best_value is not None and found.state.best_value is not None
    assert abs(found.state.best_value - whole.state.best_value) < 1e-3


def test_muon_is_sharded_too(groups: Groups, tmp_path: Path) -> None:
    """Its orthogonalisation runs in bf16: sums over ranks show in the fourth digit."""
    whole = groups.train(tmp_path / "whole", 1, "ddp", 2, muon_lr=1e-3)
    found = groups.train(tmp_path / "sharded", 2, "fsdp", 2, muon_lr=1e-3)
    assert any(name.startswith("muon/") for name in found.optimizer())
    _assert_same_weights(found, whole, atol=2e-3)


def test_adapters_are_sharded_beside_a_frozen_model_in_bf16(groups: Groups, tmp_path: Path) -> None:
    """With distillation, which runs the model a second time without them."""
    lm = f"hf:{save_folder(tmp_path / 'lm', num_hidden_layers=2, initializer_range=0.1)}"
    whole = groups.train(tmp_path / "whole", 1, "ddp", 2, lm, kl_weight=0.5)
    assert any(is_adapter(name) for name in whole.weights())
    for strategy in ("fsdp", "ddp"):
        found = groups.train(tmp_path / strategy, 2, strategy, 2, lm, kl_weight=0.5)
        _assert_same_weights(found, whole)


def test_ctc_alone_trains_nothing_of_the_language_model_under_any_strategy(
    groups: Groups, tmp_path: Path
) -> None:
    """No update, no weight decay and no state of its optimizer; then its own warm-up."""
    optim = {"ctc_only_steps": 2, "weight_decay": 10.0, "warmup_steps": 2}
    initial = ModelState(parse_config({}), SHAPE, torch.device("cpu"), 1).snapshot()[0]
    alone = groups.train(tmp_path / "whole", 1, "ddp", 2, **optim)
    for name, value in alone.weights().items():
        assert torch.equal(value, initial[name]) == name.startswith("lm."), name
    assert not any(name.startswith("adamw/lm.") for name in alone.optimizer())
    joined = groups.train(tmp_path / "whole", 1, "ddp", 3, **optim)
    assert not torch.equal(joined.weights()["lm.lm_head.weight"], initial["lm.lm_head.weight"])
    for strategy in ("fsdp", "ddp"):
        found = groups.train(tmp_path / strategy, 2, strategy, 3, **optim)
        _assert_same_weights(found, joined)


@pytest.mark.parametrize("parts", [("projector", "lora"), ("projector", "lm")])
@pytest.mark.parametrize("by_rows", [True, False])
def test_a_sharded_model_starts_from_the_same_published_weights(
    groups: Groups, tmp_path: Path, parts: tuple[str, ...], by_rows: bool
) -> None:
    """Bit for bit: read by rows, or sent by rank 0 where the files are not the model's tensors."""
    folder = save_folder(tmp_path / "lm", num_hidden_layers=2, initializer_range=0.1)
    if not by_rows:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "lm_head.weight_scale": torch.ones(1)}, path, {"format": "pt"})
    lm = f"hf:{folder}"
    whole = groups.train(tmp_path / "whole", 1, "ddp", 0, lm, parts)
    found = groups.train(tmp_path / "sharded", 3, "fsdp", 0, lm, parts)
    assert {name for name in found.digests if ".rank-" in name}
    weights, expected = found.weights(), whole.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert any(name.startswith("lm.model") for name in weights)
    assert found.state.best_value == pytest.approx(whole.state.best_value, rel=1e-5)


def test_a_sharded_model_starts_from_the_same_random_weights(
    groups: Groups, tmp_path: Path
) -> None:
    whole = groups.train(tmp_path / "whole", 1, "ddp", 0).weights()
    found = groups.train(tmp_path / "sharded", 3, "fsdp", 0).weights()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_sharded_model_continues_bit_for_bit(groups: Groups, tmp_path: Path) -> None:
    """Two steps and two after a restart are four; weights, averages and optimizer state."""
    once = groups.train(tmp_path / "once", 2, "fsdp", 4)
    groups.train(tmp_path / "twice", 2, "fsdp", 2)
    twice = groups.train(tmp_path / "twice", 2, "fsdp", 4)
    for a, b in ((once.weights(), twice.weights()), (once.optimizer(), twice.optimizer())):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_texts_are_paired_with_the_same_recordings_by_any_number_of_ranks(groups: Groups) -> None:
    # Of 1, 2, 3, 4 and 5 frames, over and over; frames and one more are the positions.
    [alone] = groups.pair(1, 7, positions=6)
    assert alone == {str(n): str((n + 1) % 7) for n in range(7)}
    for world in (2, 3):
        shares = groups.pair(world, 7, positions=6)
        assert len(shares) == world and {k: v for s in shares for k, v in s.items()} == alone
    shorter = {"0": "1", "1": "2", "2": "5", "3": None, "4": None, "5": "6", "6": "0"}
    for world in (1, 2):
        shares = groups.pair(world, 7, positions=4)
        assert {k: v for s in shares for k, v in s.items()} == shorter
    assert groups.pair(2, 1, positions=6) == [{"0": None}, {}]
