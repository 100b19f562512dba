"""What changes when a run is continued is said and kept, and its time is added up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from omni.config import Config, load_config
from omni.metrics.run_files import write_text
from omni.run.history import changed_settings, describe_change, earlier_wall_seconds


def _config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, ["--run.storage", str(tmp_path), *overrides])


def test_each_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    first = _config(tmp_path, "--optim.lr", "0.006", "--eval.patience", "3")
    first.run_dir.mkdir()
    write_text(first.run_dir / "config.yaml", first.to_yaml())
    assert changed_settings(first) == {}
    second = _config(tmp_path, "--optim.lr", "0.001", "--augment.speed", "[0.9, 1.0]")
    changed = changed_settings(second)
    assert changed == {
        "optim.lr": (0.006, 0.001),
        "eval.patience": (3, None),
        "augment.speed": ([1.0], [0.9, 1.0]),
    }
    assert describe_change("optim.lr", changed["optim.lr"]) == "optim.lr 0.006 -> 0.001"
    assert describe_change("x", (3, None)).endswith("3 -> null")


@pytest.mark.parametrize("text", ["optim: {lr: 0.001, old_name: 3}\n", "- a list\n", "\0", ""])
def test_a_config_of_another_version_tells_what_it_knows(tmp_path: Path, text: str) -> None:
    config = _config(tmp_path, "--optim.lr", "0.002")
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(text)
    known = {"optim.lr": (0.001, 0.002)} if "lr" in text else {}
    assert changed_settings(config) == known


def _events(run: Path, *rows: dict[str, Any]) -> None:
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_wall_time_adds_up_drivers_and_leaves_out_the_time_between(tmp_path: Path) -> None:
    _events(
        tmp_path,
        {"event": "started", "time": 1000.0, "wall_seconds": 0.0},
        {"event": "stopped", "time": 1060.0},
        {"event": "started", "time": 5000.0, "wall_seconds": 60.0},
        {"event": "attempt", "time": 5010.0},
    )
    assert earlier_wall_seconds(tmp_path, 7.0) == 60 + 10
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}")
    os.utime(metrics, (5040, 5040))
    assert earlier_wall_seconds(tmp_path, 7.0) == 60 + 40, "killed: up to its last row"


def test_a_run_of_an_older_version_has_the_time_of_its_steps(tmp_path: Path) -> None:
    assert earlier_wall_seconds(tmp_path, 7.0) == 7.0
    _events(tmp_path, {"event": "attempt", "time": 10.0})
    assert earlier_wall_seconds(tmp_path, 7.0) == 7.0
