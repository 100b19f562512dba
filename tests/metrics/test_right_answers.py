"""Shares of right answers, their intervals and differences, against figures known by hand."""

from __future__ import annotations

from typing import Any

import pytest

from omni.metrics.right_answers import (
    compare_tasks,
    paired_difference,
    pairs_of_tasks,
    share_interval,
)

CHOICES = ("low", "high")


def _row(task: str, n: int, label: str, guess: str, **more: Any) -> dict[str, Any]:
    scores = {name: float(name == guess) for name in CHOICES}
    row = {"id": f"u{n}:{task}", "audio": f"{n}.wav", "task": task, "reference": label}
    return {**row, "right": False, "choices": scores, **more}


def _other(guess: str) -> dict[str, Any]:
    return {"shuffled_choices": {name: float(name == guess) for name in CHOICES}}


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(
    right: int, asked: int, low: float, high: float
) -> None:
    assert share_interval(right, asked) == pytest.approx((low, high), abs=6e-5)


def test_no_question_has_no_interval() -> None:
    assert share_interval(0, 0) is None


def test_differences_are_those_of_the_literature() -> None:
    # Agresti and Min 2005 (Statistics in Medicine 24, 729), their approval ratings: 1,600 people,
    # 150 of whom gave their approval up and 86 of whom came to it.
    found = paired_difference(86, 150, 1600)
    assert found is not None
    assert found["difference"] == -0.04
    assert (found["low"], found["high"]) == pytest.approx((-0.0588, -0.0211), abs=2e-4)
    assert found["p"] == pytest.approx(3.7e-5, rel=0.1)


def test_few_answers_prove_nothing() -> None:
    found = paired_difference(3, 0, 3)
    assert found is not None and found["difference"] == 1.0
    assert found["p"] == 0.25 and found["low"] < 1.0
    same = paired_difference(0, 0, 20)
    assert same is not None and same["p"] == 1.0 and same["low"] < 0 < same["high"]
    assert paired_difference(0, 0, 0) is None


def test_systems_are_compared_task_by_task_on_common_questions() -> None:
    first = [_row("pitch", n, "low", "high") for n in range(20)]
    first += [_row("rate", n, "low", "low") for n in range(20)]
    second = [_row("pitch", n, "low", "low") for n in range(2, 22)]
    second += [_row("rate", n, "low", "low") for n in range(20)]
    said = {"id": "u0", "audio": "0.wav", "task": "transcribe", "reference": "low"}
    found = compare_tasks([*first, said], [*second, said])
    assert list(found) == ["pitch", "rate"], "transcripts are not right or wrong"
    pitch = found["pitch"]
    assert (pitch["utterances"], pitch["left_out"], pitch["difference"]) == (18, 4, 1.0)
    assert pitch["p"] < 0.001 and pitch["decided_by"] == "likelihood"
    assert found["rate"]["difference"] == 0 and found["rate"]["p"] == 1


def test_answers_decide_where_one_system_has_no_scores() -> None:
    written = [
        {k: v for k, v in _row("pitch", n, "low", "high", right=True).items() if k != "choices"}
        for n in range(3)
    ]
    found = compare_tasks(written, [_row("pitch", n, "low", "low") for n in range(3)])
    assert found["pitch"]["decided_by"] == "answer" and found["pitch"]["difference"] == -1.0


def test_a_label_that_differs_is_another_question() -> None:
    first = [_row("pitch", n, "low", "low") for n in range(3)]
    second = [_row("pitch", n, "high", "low") for n in range(3)]
    assert compare_tasks(first, second) == {}


def test_two_questions_about_a_recording() -> None:
    rows = [
        *(_row("pitch", n, "low", "low" if n < 3 else "high", **_other("high")) for n in range(4)),
        *(_row("rate", n, "high", "high" if n else "low", **_other("high")) for n in range(4)),
        _row("pitch", 9, "low", "low", **_other("low")),
        *(_row(task, 10, "high", "high", **_other("high")) for task in ("pitch", "rate")),
        *(_row(task, 11, "low", "low", **_other("low")) for task in ("pitch", "pitch", "rate")),
    ]
    [found] = pairs_of_tasks(rows)
    assert found["tasks"] == ["pitch", "rate"]
    assert (found["recordings"], found["left_out"]) == (5, 1)
    assert (found["both_right"], found["shuffled_both_right"]) == (0.6, 0.2)
    assert found["both_right_interval"] == share_interval(3, 5)
    del rows[0]["shuffled_choices"]
    assert "shuffled_both_right" not in pairs_of_tasks(rows)[0]
