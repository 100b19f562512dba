"""Seconds by phase."""

from __future__ import annotations

import time

import pytest
import torch

from omni.metrics.throughput import PHASES, Stopwatch


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
