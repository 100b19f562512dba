"""Tables and pictures of tasks; names of classes come from corpora, so they are escaped."""

from __future__ import annotations

import json
from pathlib import Path

from omni.metrics.task_scores import class_scores
from omni.report.run_page import write_report
from omni.report.score_page import Scores, markdown, page
from omni.report.task_parts import HEAD, claims, confusions, metric_text, task_line, task_rows

HOSTILE = "<b>&\"'"
FIGURES = {
    "metric": "macro_f1",
    "utterances": 4,
    "decided_by": "likelihood",
    "ece": 0.125,
    "shuffled_accuracy": 0.25,
    "exact_match": 0.5,
    **class_scores(["a", "a", HOSTILE, "a"], ["a", HOSTILE, HOSTILE, "a"], ["a", HOSTILE]),
}
FIGURES["value"] = FIGURES["macro_f1"]
RICH = {"metric": "wer", "value": 0.5, "wer": 0.5, "utterances": 4, "tags": {"pace": FIGURES}}
ROW = {"id": "u1", "reference": "<pace: fast> go", "hypothesis": f"<pace: {HOSTILE}> go",
       "task": "rich", "metric": "wer", "wer": 0.0,
       "tags": {"pace": {"label": "fast", "claimed": HOSTILE}}}  # fmt: skip


def test_a_row_of_the_table_has_all_figures() -> None:
    rows = task_rows("dev", {"mood": FIGURES, "rich": RICH}, {"mood": {"gap": 0.25}})
    assert all(len(row) == len(HEAD) for row in rows)
    shown = dict(zip(HEAD, rows[0], strict=True))
    assert shown["Task"] == "mood" and shown["Value"] == "73.3 %" == shown["Macro F1"]
    assert (shown["Most frequent"], shown["Chance"]) == ("75 %", "50 %")
    assert (shown["With other audio"], shown["Calibration error"]) == ("25 %", "12.5 %")
    assert shown["Shuffled-audio gap"] == "0.25"
    accurate = task_rows("dev", {"mood": {**FIGURES, "metric": "accuracy"}}, None)[0]
    assert dict(zip(HEAD, accurate, strict=True))["95 %"] == "30.1 to 95.4"
    assert [row[0] for row in rows] == ["mood", "rich", "rich <pace>"]
    assert task_rows("dev", None, None) == [] == task_rows("dev", {"mood": 3}, [])


def test_figures_of_100_are_no_shares() -> None:
    assert metric_text("bleu", 31.44) == "BLEU 31.4" and metric_text("accuracy", 0.5).endswith(
        "50 %"
    )
    assert "<pace> 75 %" in task_line(RICH) and "chance 50 %" in task_line(FIGURES)


def test_confusions_are_drawn_for_tasks_and_tags() -> None:
    drawn = confusions("dev", {"mood": FIGURES, "rich": RICH})
    assert [figure.title for figure in drawn] == ["mood, dev", "rich <pace>, dev"]
    svg = str(drawn[0].svg)
    assert svg.count("<rect") == 4 and HOSTILE not in svg and "&lt;b&gt;" in svg
    assert confusions("dev", {"mood": {"classes": ["a"], "confusion": "x"}}) == []


def test_claims_stand_beside_the_labels() -> None:
    assert claims(ROW) == [("pace", HOSTILE, "fast", False)]
    assert claims({"tags": "x"}) == [] == claims({})


def test_the_page_of_a_run_shows_tasks(tmp_path: Path) -> None:
    row = {"kind": "eval", "step": 1, "dev_loss": 1.0, "dev_wer": 0.5, "examples": [ROW],
           "dev_scores": {"mood": FIGURES}, "dev_task_metrics": {"mood": 0.7},
           "dev_tasks": {"mood": {"loss": 1.0, "gap": 0.25}}}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text = write_report(tmp_path).read_text()
    assert 'class="heat"' in text and "<td>73.3\u00a0%</td>" in text and HOSTILE not in text
    assert "label: fast" in text


def test_evaluate_has_a_table_of_tasks() -> None:
    result = {"checkpoint": "c", "manifest": "m", "utterances": 0, "words": 0, "wer": None,
              "cer": None, "wer_interval": None, "groups": {}, "tasks": {"mood": FIGURES},
              "substitutions": 0, "insertions": 0, "deletions": 0}  # fmt: skip
    pair = {"tasks": ["mood", "pace"], "recordings": 8, "both_right": 0.5,
            "both_right_interval": (0.2, 0.8), "shuffled_both_right": 0.125}  # fmt: skip
    result["pairs_of_tasks"] = [pair]
    test = {"manifest": "m", "first": "c", "second": "d", "task": "mood", "utterances": 4,
            "left_out": 1, "difference": 0.25, "low": -0.1, "high": 0.5, "p": 0.3}  # fmt: skip
    text = markdown(Scores([result], task_differences=[test]))
    assert "| m | d against c | mood | 4 | 1 | +25.0 | -10.0 to +50.0 | 0.3 |" in text
    assert "| c | m | mood and pace | 8 | 50 % | 20.0 to 80.0 | 12.5 % |" in text
    assert "## Tasks" in text and "| c | mood | m | 4 | macro F1 | 73.3 % |" in text
    assert 'class="heat"' in page(Scores([result]))
