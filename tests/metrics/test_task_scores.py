"""Scores of tasks against figures that can be computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from omni.corpus.tasks import TaskRule
from omni.metrics.right_answers import likeliest
from omni.metrics.score import count_errors
from omni.metrics.task_scores import (
    MOST_CLASSES,
    OTHER,
    Scoring,
    calibration_error,
    class_scores,
    spoken,
    tags_of,
    without_tags,
)

MOOD = TaskRule("mood", ("A?",), "{{ mood }}", ("calm", "loud"))
RICH = TaskRule("rich", ("A?",), "<pace: {{ pace }}> <voice:{{ voice }}> {{ text }}")


def _row(reference: str, hypothesis: str, **fields: Any) -> dict[str, Any]:
    errors = count_errors(reference, hypothesis)
    row = {"reference": reference, "hypothesis": hypothesis, "language": "en"}
    return {**row, "errors": errors, "wer": errors.wer, **fields}


def _scores(scoring: Scoring, *rows: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return scoring.score([scoring.label(row, name) for name, row in rows])


def test_only_transcripts_have_a_wer() -> None:
    scoring = Scoring({"mood": MOOD}, ["mood", "transcribe"])
    rows = [("transcribe", _row("press one", "press two")), ("mood", _row("calm", "loud"))]
    labelled = [scoring.label(row, name) for name, row in rows]
    assert [row["reference"] for row in spoken(labelled)] == ["press one"]
    assert "wer" not in labelled[1] and labelled[1]["right"] is False
    found = scoring.score(labelled)
    assert found["transcribe"]["value"] == found["transcribe"]["wer"] == 0.5
    assert "wer" not in found["mood"] and found["mood"]["decided_by"] == "answer"


@pytest.mark.parametrize(
    ("rule", "names", "metric"),
    [
        (None, ["transcribe"], "wer"),
        (None, ["dictation"], "wer"),  # the only task of a run, as it always was
        (None, ["dictation", "transcribe"], "exact_match"),
        (MOOD, ["dictation", "transcribe"], "accuracy"),
        (RICH, ["dictation", "transcribe"], "wer"),
        (TaskRule("dictation", metric="cer"), ["dictation", "transcribe"], "cer"),
    ],
)
def test_the_metric_follows_the_task(rule: TaskRule | None, names: list[str], metric: str) -> None:
    scoring = Scoring({} if rule is None else {names[0]: rule}, names)
    assert scoring.metric(names[0]) == metric


def test_a_run_with_transcripts_alone_has_no_scores_of_tasks() -> None:
    scoring = Scoring({"transcribe": TaskRule("transcribe", ("Write:",))}, ["transcribe"])
    row = _row("a", "a")
    assert scoring.label(row, "transcribe") == row and scoring.score([row]) == {}


def test_class_scores_are_those_of_the_definition() -> None:
    truth = ["a", "a", "a", "b", "b", "c"]
    found = class_scores(truth, ["a", "a", "b", "b", OTHER, "a"], ["a", "b", "c", "d"])
    assert found["accuracy"] == pytest.approx(3 / 6)
    f1 = [2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1), 0.0]  # 2 TP / (2 TP + FP + FN)
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3), "of the classes that occur"
    assert (found["majority"], found["majority_class"], found["chance"]) == (0.5, "a", 0.25)
    assert found["majority_macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 3)) / 3)
    assert found["classes"] == ["a", "b", "c", "d", OTHER]
    assert found["confusion"][:3] == [[2, 1, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]


def test_many_classes_are_pooled_in_the_confusions() -> None:
    classes = [f"c{n:02}" for n in range(MOST_CLASSES + 9)]
    truth = [name for n, name in enumerate(classes) for _ in range(n + 1)]
    found = class_scores(truth, truth, classes)
    assert found["accuracy"] == 1 and len(found["classes"]) == MOST_CLASSES + 1
    assert sum(map(sum, found["confusion"])) == len(truth)
    assert found["confusion"][-1][-1] == sum(range(1, 10)), "the rarest ones"


def test_choices_decide_by_likelihood() -> None:
    def scored(label: str, written: str, calm: float, shuffled: float) -> dict[str, Any]:
        def pair(share: float) -> dict[str, float]:
            return {"calm": math.log(share) - 5, "loud": math.log(1 - share) - 5}

        return _row(label, written, choices=pair(calm), shuffled_choices=pair(shuffled))

    rows = [
        scored("calm", "x", 0.9, 0.2),
        scored("loud", "loud", 0.2, 0.2),
        scored("calm", "y", 0.4, 0.6),
    ]
    found = _scores(Scoring({"mood": MOOD}, ["mood"]), *(("mood", row) for row in rows))["mood"]
    assert found["decided_by"] == "likelihood" and found["value"] == found["accuracy"]
    assert found["accuracy"] == pytest.approx(2 / 3) and found["exact_match"] == pytest.approx(
        1 / 3
    )
    assert found["shuffled_accuracy"] == pytest.approx(2 / 3)
    # Bins: 0.9 right, 0.8 right, 0.6 wrong.
    assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)
    assert found["confusion"] == [[1, 1], [0, 1]]


def test_a_prefix_is_not_favoured_once_the_end_counts() -> None:
    assert likeliest({"no": -3.0, "not sure": -2.5}) == "not sure"


def test_calibration_groups_by_confidence() -> None:
    sure = {"a": math.log(0.75), "b": math.log(0.25)}
    assert calibration_error([sure] * 4, ["a", "a", "a", "b"]) == pytest.approx(0.0, abs=1e-9)
    assert calibration_error([sure] * 4, ["b"] * 4) == pytest.approx(0.75)


def test_labels_outside_of_the_choices_are_counted() -> None:
    scoring = Scoring({"mood": MOOD}, ["mood"])
    found = _scores(scoring, ("mood", _row("Calm", "calm")), ("mood", _row("sad", "calm")))["mood"]
    assert (found["labels_outside_choices"], found["accuracy"]) == (1, 0.5)


def test_rich_transcripts_are_scored_for_words_and_tags() -> None:
    scoring = Scoring({"rich": RICH}, ["rich", "transcribe"])
    rows = [
        _row("<pace: fast> <voice:low> Go now please", "<pace: fast> <voice: high> go now"),
        _row("<pace: slow> <voice:low> Wait", "<voice: LOW> <mood: odd> wait"),
    ]
    labelled = [scoring.label(row, "rich") for row in rows]
    assert labelled[0]["wer"] == pytest.approx(1 / 3), "of the words alone"
    assert labelled[0]["tags"]["voice"] == {"label": "low", "claimed": "high"}
    assert labelled[1]["tags"]["pace"] == {"label": "slow", "claimed": None}
    found = scoring.score(labelled)["rich"]
    # Whisper's normaliser removes what else stands in brackets.
    assert found["metric"] == "wer" and found["value"] == pytest.approx(1 / 4)
    assert found["tags"]["pace"]["accuracy"] == 0.5 == found["tags"]["voice"]["accuracy"]
    assert found["tags"]["pace"]["confusion"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert len(spoken(labelled)) == 2


def test_tags_are_read_and_removed() -> None:
    text = "<pace: fast> Press <b> <voice:low>now < pace : slow > <note>"
    assert tags_of(text) == {"pace": "fast", "voice": "low"}
    assert without_tags(text, ["pace"]) == "Press <b> <voice:low>now <note>"
    assert RICH.tags == ("pace", "voice")


def test_free_answers_have_scores_of_sacrebleu() -> None:
    rules = {name: TaskRule(name, metric=name) for name in ("bleu", "chrf", "exact_match")}
    row = ("The cat sat on the mat.", "The cat sat on the mat.")
    found = _scores(Scoring(rules, list(rules)), *((name, _row(*row)) for name in rules))
    assert found["bleu"]["value"] == pytest.approx(100)
    assert found["chrf"]["value"] == pytest.approx(100) and found["exact_match"]["value"] == 1
    other = _scores(Scoring(rules, list(rules)), ("bleu", _row(row[0], "A dog ran to the park.")))
    assert 0 <= other["bleu"]["value"] < 20
