"""How many steps a block of the stream holds: by its bytes, and by the time of a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.config import parse_config
from omni.run.block_steps import (
    Pace,
    bytes_per_bin,
    recent_pace,
    steps_per_block,
    steps_that_fit,
)
from omni.run.rates import loaded_blocks
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import stream_settings
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
    seconds: float, size: float, data: dict[str, Any], workers: int, expected: int
) -> None:
    config = parse_config({"data": {"train": ["a"], "dev": ["b"], **data}})
    assert steps_that_fit(config, Pace(seconds, seconds), size, workers) == expected


def test_ranks_do_not_wait_long_for_a_block_that_is_encoded() -> None:
    config = parse_config(
        {"data": {"train": ["a"], "dev": ["b"]}, "train": {"timeout_seconds": 60}}
    )
    assert steps_that_fit(config, Pace(0.03, 0.03), MIB, 1) == 16
    assert steps_that_fit(config, Pace(0.03, 1.4), MIB, 1) == 4, "6 of 60 seconds"


def test_without_a_measured_step_a_block_holds_one() -> None:
    prepared = small_run()
    assert steps_per_block(prepared, True, 1, None) == 1
    assert steps_per_block(prepared, True, 1, Pace(0.01, 0.01)) > 1


@pytest.mark.parametrize("mode", ["trim", "full"])
def test_the_size_of_a_bin_is_that_in_the_stream(mode: str) -> None:
    prepared = small_run()
    encoder = prepared.config.encoder.model_copy(update={"mode": mode})
    config = prepared.config.model_copy(update={"encoder": encoder})
    facts = replace(prepared.encoder, mode=mode)  # type: ignore[arg-type]
    settings = replace(stream_settings(config, facts), fingerprint="", bins_per_block=1)
    split = prepared.splits["train"]
    plan = split.beginning
    samples = split.table["samples"].to_numpy()
    first = replace(plan, members=plan.members[: plan.starts[2]], starts=plan.starts[:3])
    loaded, _ = loaded_blocks(split, [0, 1], settings)
    encoded = [EncodeStage(settings)(block) for block in loaded]
    mels = sum(
        len(mel)
        for block in loaded
        for row in block["mels"].to_pylist()
        for of in row
        for mel in of
    )
    features = sum(len(row) for block in encoded for row in block["features"].to_pylist())
    assert bytes_per_bin(first, samples, facts, encode=False) == features / 2
    found = bytes_per_bin(first, samples, facts, encode=True)
    assert found == pytest.approx(max(mels, features) / 2, rel=0.02)
    assert np.isfinite(found)


def test_the_pace_is_that_of_the_last_lines(tmp_path: Path) -> None:
    assert recent_pace(tmp_path) is None
    rows = [
        {"kind": "train", "step": step, "step_seconds": spent, "data_wait_fraction": waited}
        for step, spent, waited in [(1, 99.0, 0.0), (6, 10.0, 0.5), (11, 5.0, 0.0), (7, 9.0, 0.0)]
    ]
    lines = [json.dumps(row) for row in (*rows[:2], {"kind": "eval", "step": 6}, *rows[2:])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = recent_pace(tmp_path)
    assert found is not None
    assert (found.busy, found.whole) == pytest.approx((1.0, 1.5))
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert recent_pace(tmp_path) is None
