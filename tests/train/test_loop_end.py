"""A loop that ends is watched until its last checkpoint is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni.run.prepare import make_worker_spec
from omni.train import loop, saving
from tests.helpers.worker_specs import small_run


def test_the_watchdog_outlives_the_writer_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Dog(loop.Watchdog):
        def beat(self, doing: str, factor: float = 1.0) -> None:
            order.append(doing)
            super().beat(doing, factor)

        def close(self) -> None:
            order.append("watchdog ends")
            super().close()

    class Writer(saving.CheckpointWriter):
        def close(self) -> None:
            order.append("writer ends")
            super().close()

    monkeypatch.setattr(loop, "Watchdog", Dog)
    monkeypatch.setattr(saving, "CheckpointWriter", Writer)
    prepared = small_run()
    run = prepared.config.run.model_copy(update={"storage": str(tmp_path)})
    config = prepared.config.model_copy(update={"run": run})
    config.run_dir.mkdir()
    spec = make_worker_spec(replace(prepared, config=config))
    with pytest.raises(RuntimeError, match="stream has ended"):
        loop.TrainLoop(spec, iter([]), 0, 1, torch.device("cpu")).run()
    assert order[-3:] == ["writing the last checkpoint", "writer ends", "watchdog ends"]
