"""How many steps a block of the stream holds: by its bytes, and by the time of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.config.settings import DataConfig
from omni.run.block_steps import recent_step_seconds, steps_per_block, steps_that_fit
from tests.helpers.worker_specs import small_run

MIB = float(1 << 20)


@pytest.mark.parametrize(
    "seconds, size, data, workers, expected",
    [
        (1.0, MIB, {}, 1, 1),
        (0.25, MIB, {}, 1, 2),
        (0.03, MIB, {}, 1, 16),
        (0.001, MIB, {}, 1, 32),
        (0.001, 5 * MIB, {"block_mb": 16}, 1, 2),
        (0.001, 100 * MIB, {}, 1, 1),
        (0.001, MIB, {"buffer_mb": 64}, 4, 4),
        (0.5, MIB, {"block_seconds": 60.0}, 1, 32),
    ],
)
def test_a_block_is_small_and_short(
    seconds: float, size: float, data: dict[str, float], workers: int, expected: int
) -> None:
    settings = DataConfig.model_validate({"train": ["a"], "dev": ["b"], **data})
    assert steps_that_fit(settings, seconds, size, workers) == expected


def test_without_a_measured_step_a_block_holds_one() -> None:
    assert steps_per_block(small_run(), True, 1) == 1


def test_a_steps_time_is_that_of_the_last_lines(tmp_path: Path) -> None:
    assert recent_step_seconds(tmp_path) is None
    rows = [
        {"kind": "train", "step": step, "step_seconds": spent}
        for step, spent in [(1, 99.0), (6, 4.0), (11, 6.0), (7, 9.0)]
    ]
    lines = [json.dumps(row) for row in (*rows[:2], {"kind": "eval", "step": 6}, *rows[2:])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert recent_step_seconds(tmp_path) == pytest.approx(1.0)
