"""Choose the number of encoder actors from measured rates, and hand on a number only."""

from __future__ import annotations

import re
from typing import Any

import pytest

from omni.config import load_config
from omni.run.actor_count import assume_actors, choose_actors, is_auto

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
    choice = choose_actors(**{**RUN, **changed})
    assert (choice.actors, choice.gpus) == (actors, gpus)
    assert choice.reason.startswith(f"{actors} ")


def test_the_reason_names_rates_and_what_would_be_needed() -> None:
    assert "240 audio-s/s" in choose_actors(**RUN).reason
    short = choose_actors(**{**RUN, "spare": 2.0}).reason
    assert re.search(r"\b3\b.*\b2\b.*\b2 GPUs\b.*\bcache\b.*\b17%", short)
    lasting = choose_actors(**{**RUN, "spare": 2.0, "lasting": True}).reason
    assert re.search(r"\b3\b.*\b2\b.*\b2 GPUs\b.*\b17%", lasting) and "cache" not in lasting
    assert "cache" in choose_actors(**{**RUN, "missing": 0.0}).reason


def test_auto_is_refused_by_whoever_needs_a_number() -> None:
    config = load_config(None, ["--encoder.actors", "auto"])
    assert is_auto(config)
    with pytest.raises(ValueError, match="encoder.actors"):
        _ = config.encoder.actor_count
    assumed = assume_actors(config, 3)
    assert not is_auto(assumed) and assumed.encoder.actor_count == 3
    assert assume_actors(assumed, 5) is assumed
