"""What a process exports: names, labels and values. tests/cluster sees it in a real Prometheus."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from omni.metrics import prometheus
from omni.metrics.prometheus import RayPublisher, driver_publisher

Series = dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> Series:
    """Values that were given to Ray, by name and labels: those set, and the amounts added."""
    found: Series = {}

    class Kept:
        def __init__(self, name: str, about: str, labels: tuple[str, ...]) -> None:
            self.name, self.labels = name, labels

        def set_default_tags(self, tags: dict[str, str]) -> None:
            self.tags = tags

        def set(self, value: float, tags: dict[str, str]) -> None:
            labels = {**self.tags, **tags}
            assert set(labels) == set(self.labels)
            found.setdefault((self.name, tuple(sorted(labels.items()))), []).append(value)

        inc = set

    monkeypatch.setattr(prometheus, "Gauge", Kept)
    monkeypatch.setattr(prometheus, "Counter", Kept)
    return found


@pytest.fixture
def rank(series: Series) -> Iterator[RayPublisher]:
    publisher = RayPublisher("r", 3)
    yield publisher
    publisher.close()


def _labels(**more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"run": "r", **more}.items()))


def test_a_rank_is_a_label_of_its_own_metrics_alone(series: Series, rank: RayPublisher) -> None:
    rank.publish("omni_rank_step_seconds", 0.5)
    rank.publish("omni_phase_seconds", {"forward": 2.0, "copy": 0.0})
    rank.publish("omni_checkpoint_failures", 1)
    rank.publish("omni_checkpoint_failures", 1)
    assert series == {
        ("omni_rank_step_seconds", _labels(rank="3")): [0.5],
        ("omni_phase_seconds", _labels(phase="forward", rank="3")): [2.0],
        ("omni_checkpoint_failures", _labels()): [1, 1],
    }


def test_a_driver_says_that_it_is_there_and_that_it_has_ended(series: Series) -> None:
    before = int(time.time())
    with driver_publisher("r") as publisher:
        publisher.publish("omni_attempts", 1)
        [began] = series["omni_driver_began", _labels()]
        assert ("omni_driver_ended", _labels()) not in series
    assert before <= began <= time.time()
    assert series["omni_driver_ended", _labels()] == [began]
    assert series["omni_attempts", _labels()] == [1]


def test_a_driver_that_fails_does_not_say_that_it_has_ended(series: Series) -> None:
    with pytest.raises(RuntimeError, match="rank 1"), driver_publisher("r"):
        raise RuntimeError("rank 1: no such file")
    assert ("omni_driver_began", _labels()) in series
    assert ("omni_driver_ended", _labels()) not in series


def test_gauges_are_set_again_until_their_process_is_done(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "_REFRESH_SECONDS", 0.01)
    before: set[Any] = set(threading.enumerate())
    publisher = RayPublisher("r")
    [thread] = set(threading.enumerate()) - before
    publisher.publish("omni_driver_began", 7)
    values = series["omni_driver_began", _labels()]
    deadline = time.monotonic() + 30
    while len(values) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    publisher.close()
    thread.join(30)
    assert not thread.is_alive() and set(values) == {7}
