"""Whole and sharded training are the same training, and continue each other's checkpoints."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from omni.checkpoint.checkpoint import Checkpoint
from omni.checkpoint.resume import newest_checkpoint
from omni.model.lm.lora import is_adapter
from tests.helpers.hf_folders import save_folder
from tests.helpers.sharded import work


def _train(folder: Path, world: int, strategy: str, steps: int, kind: str = "gpt") -> Checkpoint:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        work, (world, strategy, steps, str(folder), port, kind), nprocs=world
    )
    found = newest_checkpoint(folder)
    assert found is not None and found.state.step == steps
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _train(tmp_path_factory.mktemp("whole"), 1, "ddp", 6)


@pytest.mark.parametrize("parts", [[(2, "fsdp"), (1, "ddp")], [(2, "ddp"), (3, "fsdp")]])
def test_any_strategy_continues_any_other(
    whole: Checkpoint, tmp_path: Path, parts: list[tuple[int, str]]
) -> None:
    for number, (world, strategy) in enumerate(parts, start=1):
        found = _train(tmp_path, world, strategy, 3 * number)
    for name, expected in (whole.weights() | whole.optimizer()).items():
        value = (found.weights() | found.optimizer())[name]
        assert value.shape == expected.shape
        torch.testing.assert_close(
            value, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found.weights().keys() == whole.weights().keys()
    assert found.optimizer().keys() == whole.optimizer().keys()
    assert whole.state.best_value is not None and found.state.best_value is not None
    assert abs(found.state.best_value - whole.state.best_value) < 1e-3


def test_muon_is_sharded_too(tmp_path: Path) -> None:
    """Its orthogonalisation runs in bf16: sums over ranks show in the fourth digit."""
    whole = _train(tmp_path / "whole", 1, "ddp", 4, "muon")
    found = _train(tmp_path / "sharded", 2, "fsdp", 4, "muon")
    assert any(name.startswith("muon/") for name in found.optimizer())
    for name, expected in whole.weights().items():
        torch.testing.assert_close(
            found.weights()[name], expected, rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_adapters_are_sharded_beside_a_frozen_model_in_bf16(tmp_path: Path) -> None:
    """With distillation, which runs the model a second time without them."""
    lm = f"hf:{save_folder(tmp_path / 'lm', initializer_range=0.1)}"
    whole = _train(tmp_path / "whole", 1, "ddp", 3, lm)
    assert any(is_adapter(name) for name in whole.weights())
    for strategy in ("fsdp", "ddp"):
        found = _train(tmp_path / strategy, 2, strategy, 3, lm)
        assert found.weights().keys() == whole.weights().keys()
        for name, expected in whole.weights().items():
            torch.testing.assert_close(
                found.weights()[name],
                expected,
                rtol=1e-4,
                atol=1e-4,
                msg=lambda m, n=f"{strategy} {name}": f"{n}: {m}",
            )
