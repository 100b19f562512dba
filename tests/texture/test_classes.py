"""Terciles of groups, and why a value has no class."""

from __future__ import annotations

import numpy as np

from omni.texture.classes import terciles

NAN = float("nan")


def test_terciles_of_a_corpus() -> None:
    made = terciles(np.arange(9.0), ["corpus"] * 9, "corpus")
    assert made.classes == ["low"] * 3 + ["mid"] * 3 + ["high"] * 3
    assert made.without == {}
    [(low, high)] = made.bounds.values()
    assert 2 < low < 3 and 5 < high < 6


def test_a_value_is_low_for_one_speaker_and_high_for_another() -> None:
    values = np.array([1, 2, 3, 11, 12, 13, 4, 11, 5.0])
    speakers = [*"aaabbb", "a", "b", None]
    made = terciles(values, speakers, "speaker", least=4)
    assert made.classes[6] == "high" and made.classes[7] == "low" and made.classes[8] is None
    assert set(made.bounds) == {"a", "b"} and made.without == {"no speaker": 1}


def test_what_has_no_class_is_counted_by_reason() -> None:
    values = np.array([1, 2, NAN, 5, 5, 5, 5, 7.0])
    made = terciles(values, [*"aaabbbb", None], "speaker", least=3)
    assert made.classes == [None] * 8 and made.bounds == {}
    assert made.without == {
        "no speaker": 1,
        "fewer than 3 of the speaker": 2,
        "values of the speaker are too alike": 4,
    }


def test_bounds_of_another_corpus() -> None:
    values = np.array([1, 2, 2.5, NAN, 9])
    made = terciles(values, ["a", "a", "a", "a", "b"], "speaker", 30, {"a": (1, 2)})
    assert made.classes == ["low", "mid", "high", None, None]
    assert made.without == {"no bounds of the speaker": 1}
