"""How many encoders: decisions from rates, and simulated runs that agree with arithmetic."""

from __future__ import annotations

import re
from typing import Any

import pytest

from omni.run.sizing import best_split, choose_actors, simulate

RUN: dict[str, Any] = {
    "encoder_rate": 100.0,
    "trainer_rate": 60.0,
    "workers": 4,
    "missing": 1.0,
    "spare": 8.0,
    "each": 1.0,
    "unit": "GPUs",
}


@pytest.mark.parametrize(
    "changed, actors, gpus",
    [
        ({}, 3, 1.0),  # 240 audio-s/s and a tenth more
        ({"encoder_rate": 264.1}, 1, 1.0),
        ({"encoder_rate": 263.9}, 2, 1.0),
        ({"spare": 2.0}, 2, 1.0),  # what fits
        ({"spare": 0.25}, 1, 0.25),  # a share of what is left
        ({"spare": 1.0, "each": 0.25}, 3, 0.25),
        ({"missing": 0.0}, 1, 1.0),  # nothing to encode
        ({"spare": 0.0}, 1, 1.0),  # the run must start; the reason says what is missing
    ],
)
def test_actors_are_as_many_as_the_trainers_ask_for_and_fit(
    changed: dict[str, Any], actors: int, gpus: float
) -> None:
    sizing = choose_actors(**{**RUN, **changed})
    assert (sizing.actors, sizing.gpus) == (actors, gpus)
    assert sizing.reason.startswith(f"{actors} ")


def test_the_reason_names_rates_and_what_would_be_needed() -> None:
    assert "240 audio-s/s" in choose_actors(**RUN).reason
    short = choose_actors(**{**RUN, "spare": 2.0}).reason
    assert re.search(r"\b3\b.*\b2\b.*\b2 GPUs\b.*\bcache\b.*\b17%", short)
    lasting = choose_actors(**{**RUN, "spare": 2.0, "lasting": True}).reason
    assert re.search(r"\b3\b.*\b2\b.*\b2 GPUs\b.*\b17%", lasting) and "cache" not in lasting
    assert "cache" in choose_actors(**{**RUN, "missing": 0.0}).reason


def test_few_encoders_set_the_pace_and_trainers_starve() -> None:
    played = simulate(1, 8, encode_seconds=[0.5], train_seconds=[0.25], audio_seconds=30.0)
    assert played.rate == pytest.approx(60.0, rel=0.02)
    assert played.starving == "trainers"
    assert played.trainers_wait == pytest.approx(1 - 0.25 / 4.0, abs=0.02)
    assert played.encoders_wait == pytest.approx(0.0, abs=0.05)


def test_many_encoders_wait_for_the_trainers() -> None:
    played = simulate(8, 2, encode_seconds=[0.5], train_seconds=[0.5], audio_seconds=10.0)
    assert played.rate == pytest.approx(2 * 10.0 / 0.5, rel=0.02)
    assert played.starving == "encoders"
    assert played.encoders_wait == pytest.approx(0.75, abs=0.05)


def test_a_filled_cache_needs_no_encoder_and_sync_costs_each_step() -> None:
    how: dict[str, Any] = {"encode_seconds": [1.0], "train_seconds": [0.4], "audio_seconds": 4.0}
    assert simulate(0, 3, **how).rate == pytest.approx(3 * 4.0 / 0.4)
    assert simulate(0, 3, sync_seconds=0.1, **how).rate == pytest.approx(3 * 4.0 / 0.5)


def test_the_slowest_rank_ends_a_step() -> None:
    even = simulate(0, 64, encode_seconds=[1.0], train_seconds=[1.0], audio_seconds=1.0)
    uneven = simulate(0, 64, encode_seconds=[1.0], train_seconds=[0.5, 1.5], audio_seconds=1.0)
    assert even.starving == "neither"
    assert uneven.rate == pytest.approx(64 / 1.5, rel=0.01)
    assert uneven.trainers_wait == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("devices", [2, 3, 7, 12])
@pytest.mark.parametrize("encode", [0.05, 0.3, 2.0])
def test_no_other_split_is_better(devices: int, encode: float) -> None:
    how: dict[str, Any] = {"encode_seconds": [encode], "train_seconds": [0.3], "audio_seconds": 9.0}
    encoders, trainers, best = best_split(devices, **how)
    assert encoders + trainers == devices
    every = [simulate(e, devices - e, **how).rate for e in range(1, devices)]
    assert best.rate >= 0.98 * max(every)


def test_thousands_of_devices_take_seconds() -> None:
    played = simulate(2000, 2096, encode_seconds=[0.2], train_seconds=[0.2], audio_seconds=30.0)
    assert played.rate == pytest.approx(2000 * 30.0 / 0.2, rel=0.06)
