"""Which stage the others wait for."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from omni.metrics.throughput import ADVICE, judge
from tests.helpers.whole_runs import lines, run_job


@pytest.mark.parametrize(
    ("figures", "limit", "shares"),
    [
        (
            {"waited": 0.5, "encode_seconds": 30.0, "load_seconds": 5.0},
            "trainer",
            {"trainers": "95%"},
        ),
        (
            {"waited": 4.0, "encode_seconds": 38.0, "load_seconds": 15.0},
            "encoder",
            {"encoders": "95%", "trainers": "40%"},
        ),
        (
            {"waited": 7.0, "encode_seconds": 9.0, "load_seconds": 19.6},
            "decode",
            {"loaders": "98%", "trainers": "70%"},
        ),
        (
            {"waited": 5.0, "encode_seconds": 4.0, "load_seconds": 2.0},
            "network",
            {"trainers": "50%", "encoders": "10%", "loaders": "10%"},
        ),
        (
            {"waited": 9.0, "encode_seconds": 80.0, "load_seconds": 0.0},
            "encoder",
            {"encoders": "100%"},
        ),
    ],
)
def test_the_stage_that_the_others_wait_for(
    figures: dict[str, Any], limit: str, shares: dict[str, str]
) -> None:
    verdict = judge(10.0, encoders=4, loaders=2, **figures)
    assert verdict.limit == limit and str(verdict).startswith(f"{limit}-bound: ")
    told = dict(re.findall(r"(trainers|encoders|loaders)\b[^%,]*?(\d+%)", str(verdict)))
    assert told.items() >= shares.items()
    assert ADVICE[limit]


def test_a_step_that_took_no_time_is_no_error() -> None:
    found = judge(0.0, waited=0.0, encode_seconds=0.0, encoders=0, load_seconds=0.0, loaders=0)
    assert found.limit == "trainer"


SLOW_STORAGE = ["--data.loader_rate", "10", "--data.loaders", "1"]  # 84 s of audio an epoch
SLOW_ENCODER = ["--encoder.margin_seconds", "28"]  # of silence, with each recording
SLOW_TRAINER = ["--model.n_layer", "8", "--model.n_embd", "384", "--optim.bins_per_step", "8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("throttle", "limit"),
    [(SLOW_STORAGE, "decode"), (SLOW_ENCODER, "encoder"), (SLOW_TRAINER, "trainer")],
    ids=["storage", "encoder", "trainer"],
)
def test_a_throttled_stage_is_named(
    tiny: Path, tmp_path: Path, throttle: list[str], limit: str
) -> None:
    done = run_job(tiny, tmp_path, "--optim.steps", "20", "--data.cache", "null", *throttle)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["throughput_limit"] == limit, summary["throughput_verdict"]
    assert summary["throughput_verdict"].startswith(f"{limit}-bound: ")
    rows = [row for row in lines(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert [row["limit"] for row in rows].count(limit) > 10
    assert f"({limit}-bound)" in done.stdout
    assert re.search(rf"\babout \d.*\b{limit}-bound", done.stdout), "and it was foreseen"
    page = (tmp_path / "run/report.html").read_text()
    assert summary["throughput_verdict"] in page and escape(summary["throughput_advice"]) in page
