"""Seconds by phase, model FLOPs utilisation, and the stage that limits throughput."""

from __future__ import annotations

import json
import re
import time
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from omni.metrics.rows import Pools, Window
from omni.metrics.table import StepSums
from omni.metrics.throughput import (
    ADVICE,
    PHASES,
    FirstSteps,
    Stopwatch,
    TrainingFlops,
    judge,
    peak_flops,
    peak_of,
    training_flops,
)
from tests.helpers.whole_runs import lines, run_job


def test_phases_add_up_and_are_taken_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.phase("forward"):
            time.sleep(0.02)
    with pytest.raises(ValueError), watch.phase("backward"):
        raise ValueError
    watch.add("wait", 1.5)
    taken = watch.take()
    assert tuple(taken) == PHASES
    assert taken["forward"] >= 0.04 and taken["backward"] > 0 and taken["wait"] == 1.5
    assert taken["optimizer"] == 0 and set(watch.take().values()) == {0.0}


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("NVIDIA H100 PCIe", "NVIDIA H100 NVL"),
        ("NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA L4", "NVIDIA L40S"),
        ("NVIDIA A10G", "NVIDIA A10"),
        ("NVIDIA A10", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_gpus_whose_names_begin_alike_are_told_apart(slower: str, faster: str) -> None:
    low, high = peak_of(slower), peak_of(faster)
    assert low is not None and high is not None and low < high


@pytest.mark.parametrize("name", ["Tesla K80", "NVIDIA L400", "NVIDIA"])
def test_a_gpu_that_is_not_known_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_a_cpu_has_no_peak_that_we_know() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_weights_of_products_count_frozen_ones_less_and_the_head_where_it_is_used() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    head = model[3]
    assert isinstance(head, nn.Linear)
    assert training_flops(model, head) == TrainingFlops(6 * 8 * 4, 6 * 4 * 2)
    model[1].requires_grad_(False)
    assert training_flops(model, head) == TrainingFlops(4 * 8 * 4, 6 * 4 * 2)
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight
    assert isinstance(tied[1], nn.Linear)
    assert training_flops(tied, tied[1]) == TrainingFlops(0, 6 * 4 * 10), "its products are real"


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
            "stream",
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
    assert "no encoders" not in str(verdict)


@pytest.mark.parametrize("waited, load_seconds", [(0.5, 5.0), (7.0, 19.6), (5.0, 2.0)])
def test_a_stream_without_encoders_is_not_judged_by_them(
    waited: float, load_seconds: float
) -> None:
    verdict = judge(
        10.0, waited=waited, encode_seconds=0.0, encoders=0, load_seconds=load_seconds, loaders=2
    )
    assert str(verdict).endswith("no encoders: all features are cached")
    assert "encoders are busy" not in str(verdict) and verdict.busy["encoder"] == 0


def test_blocks_travel_only_between_nodes() -> None:
    figures = {"waited": 5.0, "encode_seconds": 0.0, "load_seconds": 0.0}
    one, two = (judge(10.0, encoders=1, loaders=1, nodes=n, **figures).limit for n in (1, 2))
    assert (one, two) == ("stream", "network")


def test_the_start_of_an_attempt_is_no_verdict() -> None:
    """The first steps wait for the stream; the steps after them are judged alone."""
    pools, window, first = Pools(1, 1, nodes=2), Window(), FirstSteps()
    for spent, waited in ((10.0, 9.0), (2.0, 1.0), (1.0, 0.0)):
        window.add(StepSums(load_seconds=0.5), spent, waited, first.includes(spent, waited))
        if waited:
            assert window.verdict(pools).limit == "start" and ADVICE["start"]
            assert str(window.verdict(pools)).startswith("waiting for the first blocks")
    assert window.verdict(pools).limit == "trainer"
    assert not first.includes(10.0, 9.0), "a later wait is a wait"
    assert (window.busy, window.wait, window.steps) == (13.0, 10.0, 3)
    back = Window.from_dict(json.loads(json.dumps(window.to_dict())))
    assert back.verdict(pools) == window.verdict(pools)
    assert back.to_dict() == window.to_dict()


def test_a_start_that_never_ends_is_judged_after_some_steps() -> None:
    first = FirstSteps()
    starved = [first.includes(1.0, 0.9) for _ in range(30)]
    assert starved == [True] * 20 + [False] * 10


def test_a_step_that_took_no_time_is_no_error() -> None:
    found = judge(0.0, waited=0.0, encode_seconds=0.0, encoders=0, load_seconds=0.0, loaders=0)
    assert found.limit == "trainer"


SLOW_STORAGE = ["--data.loader_rate", "10", "--data.loaders", "1"]  # 84 s of audio an epoch
SLOW_ENCODER = ["--encoder.margin_seconds", "4"]  # of silence, with each recording
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
    # Steps that wait are no verdict until there have been twenty.
    steps = "20" if limit == "trainer" else "40"
    done = run_job(tiny, tmp_path, "--optim.steps", steps, "--data.cache", "null", *throttle)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["throughput_limit"] == limit, summary["throughput_verdict"]
    assert summary["throughput_verdict"].startswith(f"{limit}-bound: ")
    rows = [row for row in lines(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert [row["limit"] for row in rows].count(limit) > 10
    assert f"({limit}-bound)" in done.stdout
    assert re.search(rf"\babout \d.*\b{limit}-bound", done.stdout), "and it was foreseen"
    page = (tmp_path / "run/report.html").read_text()
    assert summary["throughput_verdict"] in page and escape(summary["throughput_advice"]) in page
