"""Scores of systems: groups, differences on what both have, the worst; tables and pages of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import evaluate
from jobs.__main__ import main
from omni.inference.scores import compare, summarize, worst
from omni.metrics.score import count_errors
from omni.report.score_page import Scores, markdown, page

pytestmark = pytest.mark.unit
TEXTS = ["press two", "the number is not in service", "goodbye", "please hold the line now"]


def _rows(hypotheses: list[str], **columns: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"u{n}",
            "language": "en",
            "reference": reference,
            "hypothesis": hypothesis,
            "wer": count_errors(reference, hypothesis).wer,
            "decoder": "lm",
            "errors": count_errors(reference, hypothesis),
            "errors_alone": {},
            **{name: values[n] for name, values in columns.items()},
        }
        for n, (reference, hypothesis) in enumerate(zip(TEXTS, hypotheses, strict=True))
    ]


def test_figures_of_groups_add_up_to_the_whole() -> None:
    rows = _rows(
        ["press to", "the number is in service", "goodbye", "please hold the line now now"],
        speaker=["a", "b", "a", None],
        task=["transcribe"] * 4,
    )
    found = summarize(rows)
    assert (found["substitutions"], found["insertions"], found["deletions"]) == (1, 1, 1)
    assert found["wer"] == 3 / 14 and found["word_errors"] == 3
    low, high = found["wer_interval"]
    assert low <= found["wer"] <= high
    lengths = found["groups"]["length"]
    assert list(lengths) == ["1 to 2 words", "3 to 5 words", "6 to 10 words"]
    assert sum(group["words"] for group in lengths.values()) == 14
    assert found["groups"]["speaker"]["a"] == {"utterances": 2, "words": 3, "wer": 1 / 3}
    assert set(found["groups"]) == {"length", "speaker"}, "one task is no group"


def test_systems_are_compared_on_what_both_have() -> None:
    first, second = _rows(["", "", "", ""]), _rows(TEXTS)
    found = compare(first, second[:3])
    assert found is not None
    assert (found["utterances"], found["left_out"]) == (3, 1)
    assert found["difference"] == -1.0 and found["high"] == -1.0 and found["p"] < 0.001
    shouted = [{**row, "reference": row["reference"].upper()} for row in second]
    assert compare(first, shouted) == compare(first, second), "case is no part of an utterance"
    elsewhere = [{**row, "audio": "/other.wav"} for row in second]
    assert compare(first, elsewhere) is None


def test_the_worst_have_the_most_errors() -> None:
    rows = _rows(["press to", "", "hello", "please hold the line now"])
    assert [row["id"] for row in worst(rows, 10)] == ["u1", "u2", "u0"]
    assert [row["id"] for row in worst(rows, 1)] == ["u1"]


def test_tables_hold_every_figure_and_escape_what_is_written() -> None:
    rows = _rows(["<b>press</b> to", "a | b", "goodbye", ""])
    of = {"checkpoint": "runs/a|b", "manifest": "dev.jsonl"}
    other = compare(rows, _rows(TEXTS))
    differences = [{"manifest": "dev.jsonl", "first": "a", "second": "b", **(other or {})}]
    shown = [{"checkpoint": "a", "corpus": "dev.jsonl", "audio": "/nowhere", **r} for r in rows]
    scores = Scores([{**of, **summarize(rows)}], differences, worst=shown)
    text = markdown(scores)
    assert "runs/a\\|b" in text and "## Differences" in text and "## By length" in text
    columns = {line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"}
    assert columns == {11, 8, 7}
    html = page(scores)
    assert "<b>press</b>" not in html and html.count("No audio") == 4


def test_the_job_scores_checkpoints_and_corpora_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    folder.symlink_to(Path("omni/assets/omni-tiny").resolve())
    table, rows = tmp_path / "table.html", tmp_path / "rows.jsonl"
    systems = ["--checkpoint", "omni-tiny", "--checkpoint", str(folder)]
    arguments = ["--data", "embedded:test", "--table", str(table), "--out", str(rows)]
    assert evaluate.main([*systems, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["checkpoint"] for r in found["results"]] == ["omni-tiny", str(folder)]
    [difference] = found["differences"]
    assert (difference["difference"], difference["p"]) == (0.0, 1.0)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == 64 and {row["checkpoint"] for row in written} == set(systems[1::2])
    assert "errors" not in written[0]
    assert table.read_text().count("<audio") >= 10


@pytest.mark.parametrize(
    ("extra", "named"),
    [(["--table", "x.txt"], "--table"), (["--data", "embedded:dev"], "--data: given twice")],
)
def test_wrong_arguments_are_named(
    extra: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--checkpoint", "omni-tiny", "--data", "embedded:dev"]
    assert main(["evaluate", *given, *extra]) == 2
    assert named in capsys.readouterr().err
