"""Comparisons of runs: copies of a real run whose files were changed."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import compare
from omni.metrics.score import count_errors
from omni.report.comparison import compare_runs, not_compared
from omni.storage.path import as_path
from tests.helpers.loopback_s3 import s3_bucket
from tests.helpers.whole_runs import lines
from tests.report.test_run_page import HOSTILE, Page, write_rows

Copy = Callable[..., Path]


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Copy:
    """Copy the shared run under another name, with settings, summary and dev hypotheses changed."""

    def make(
        name: str,
        settings: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
        hypotheses: dict[int, str] | None = None,
    ) -> Path:
        run = tmp_path / name
        files = shutil.ignore_patterns(".ray", "checkpoints", "tensorboard", "plan")
        shutil.copytree(undisturbed, run, ignore=files)
        config = yaml.safe_load((run / "config.yaml").read_text())
        for setting, value in {"run.name": name, **(settings or {})}.items():
            section, field = setting.split(".")
            config[section][field] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        figures = json.loads((run / "summary.json").read_text()) | (summary or {})
        (run / "summary.json").write_text(json.dumps(figures))
        rows = lines(run / "transcripts-dev.jsonl")
        for number, text in (hypotheses or {}).items():
            rows[number]["hypothesis"] = text
            rows[number]["wer"] = count_errors(rows[number]["reference"], text).wer
        write_rows(run / "transcripts-dev.jsonl", rows)
        return run

    return make


def unfinished(run: Path, step: int) -> Path:
    """Make a run what it was at a step: killed, without its end."""
    rows = lines(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [row for row in rows if row["step"] <= step])
    for name in ("summary.json", "transcripts-dev.jsonl"):
        (run / name).unlink()
    return run


def change(run: Path, key: str, to: Callable[[float], float]) -> None:
    """Change a value in the rows of metrics.jsonl that have it."""
    rows = lines(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [r | {key: to(r[key])} if key in r else r for r in rows])


def cells(page: Page, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading."""
    inside = page.all("main")[0].inside
    at = next(i for i, e in enumerate(inside) if e.tag == "h2" and e.text == heading)
    table = next(e for e in inside[at:] if "table" in e.classes)
    return [[" ".join(c.text.split()) for c in row.all("td")] for row in table.all("tr")][1:]


def marked(page: Page) -> dict[str, list[int]]:
    """Positions of the marked runs in each figure's row."""
    found = {}
    for row in page.all("tr"):
        values = row.all("td")[1:]
        best = [n for n, value in enumerate(values) if value.all("span", "top")]
        if best:
            found[row.all("td")[0].text] = best
    return found


def page_of(tmp_path: Path, *runs: Path) -> Page:
    out = tmp_path / "compare.html"
    assert compare.main([*map(str, runs), "--out", str(out)]) == 0
    return Page(out)


def test_settings_figures_and_transcripts_that_differ(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = copy("a", summary={"dev_wer": 0.5, "shuffled_audio_gap": 0.1})
    lower = {"optim.lr": 5e-4, "model.window_pattern": "SL"}
    rows = lines(a / "transcripts-dev.jsonl")
    right = {3: rows[3]["reference"], 5: rows[5]["reference"] + " now"}
    b = copy("b", lower, {"dev_wer": 0.25, "shuffled_audio_gap": 0.05}, right)
    page = page_of(tmp_path, a, b)

    assert cells(page, "Settings that differ") == [
        ["model.window_pattern", "L", "SL"],
        ["optim.lr", "0.002", "0.0005"],
    ]
    figures = {row[0]: row[1:] for row in cells(page, "Final figures")}
    assert figures["Dev WER"] == ["50 %", "25 %"] and figures["Steps"] == ["50", "50"]
    assert "Test WER" not in figures, "neither run has one"
    assert marked(page) == {"Dev WER": [1], "Shuffled-audio gap": [0]}, "equal ones are not marked"

    articles = page.all("article")
    assert [a.all("small")[0].text for a in articles] == [f"dev · {rows[n]['id']}" for n in (3, 5)]
    first, second = (article.all("dd") for article in articles)
    assert first[0].text == rows[3]["reference"]
    assert [mark.tag for mark in first[4].inside] == [], "b is right"
    assert [e.text for e in second[4].all("ins")] == ["now"]
    assert not first[3].all("span", "top") and first[5].all("span", "top")
    audio = [article.all("audio")[0].attributes["src"] for article in articles]
    for source, number in zip(audio, (3, 5), strict=True):
        data = base64.b64decode(source.removeprefix("data:audio/ogg;base64,"))
        assert data == Path(rows[number]["audio"]).read_bytes()

    shown = capsys.readouterr().out
    assert all(text in shown for text in ("optim.lr", "0.0005", "25 % *", rows[3]["id"]))
    assert "50 % *" not in shown
    assert "{+now+}" in shown and f"[-{rows[5]['reference'].split()[0]}-]" in shown


def test_curves_lie_over_each_other(copy: Copy, tmp_path: Path) -> None:
    a, b = copy("a"), unfinished(copy("b"), 31)
    change(b, "loss", lambda value: value + 1)
    page = page_of(tmp_path, a, b)
    for number, run in enumerate((a, b)):
        rows = lines(run / "metrics.jsonl")
        losses = {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}
        drawn = page.curve("Train loss", number)
        assert len(drawn) == len(losses) and drawn == pytest.approx(losses, rel=1e-3)
        evals = [r for r in rows if r["kind"] == "eval"]
        for title, key, scale in (
            ("Dev loss", "dev_loss", 1),
            ("Dev word error rate", "dev_wer", 100),
        ):
            measured = {r["step"]: scale * r[key] for r in evals}
            assert page.curve(title, number) == pytest.approx(measured, rel=1e-3)


def test_what_was_not_measured_alike_is_not_marked(copy: Copy, tmp_path: Path) -> None:
    a = copy("a", summary={"dev_wer": 0.5, "test_wer": 0.5, "dev_loss": 1.0})
    b = copy("b", {"data.dev": ["other.jsonl"]}, {"dev_wer": 0.2, "test_wer": 0.6, "dev_loss": 2.0})
    found = compare_runs([a, b])
    best = {figure.label: figure.best for figure in found.figures if any(figure.best)}
    assert best == {"Test WER": [True, False]}
    assert {f.differ for f in found.figures if f.label.startswith("Dev")} == {"data.dev"}

    c = copy("c", summary={"dev_wer": 0.2, "dev_loss": 2.0})
    tokenizer = (c / "tokenizer.json").read_text()
    (c / "tokenizer.json").write_text(tokenizer + " ")
    found = compare_runs([a, c])
    best = {figure.label: figure.best for figure in found.figures if any(figure.best)}
    assert best == {"Dev WER": [False, True]}, "a loss per token depends on the tokens"
    assert any(
        "Dev loss" in note and "tokenizer.json" in note for note in not_compared(found.figures)
    )


def test_metrics_of_ones_own_stand_beside_each_other(copy: Copy) -> None:
    a = copy("a", summary={"dev_metrics": {"digits missing": 0.25}})
    b = copy("b", summary={"dev_metrics": {"digits missing": 0.5, "names": None}})
    figures = {figure.label: figure for figure in compare_runs([a, b]).figures}
    assert figures["Dev digits missing"].values == ["0.25", "0.5"]
    assert not any(figures["Dev digits missing"].best), "omni does not know which is better"
    assert "Dev names" not in figures


def test_unfinished_runs_are_compared_at_the_last_common_step(copy: Copy, tmp_path: Path) -> None:
    a = copy("a", summary={"dev_loss": 9.0})
    b, c = copy("b", summary={"dev_loss": 8.0}), unfinished(copy("c"), 31)
    change(c, "dev_loss", lambda value: 1.0)
    found = compare_runs([a, b, c])
    assert found.states[:2] == ["finished", "finished"] and "31 of 50" in found.states[2]
    final = next(figure for figure in found.figures if figure.label.startswith("Dev loss"))
    assert (final.values, final.best) == (["9", "8", "1"], [False, True, False])
    at = next(figure for figure in found.at_step if figure.label == "Dev loss")
    assert found.step == 25 and at.best == [False, False, True]
    # Of its transcripts there are only the examples of its last evaluation.
    (agreement,) = found.agreements
    assert agreement.common == 8 and any(note.startswith("c: ") for note in agreement.notes)


def test_transcripts_of_other_utterances_are_counted_not_compared(copy: Copy) -> None:
    a, b = copy("a"), copy("b")
    rows = lines(b / "transcripts-dev.jsonl")
    rows[0]["reference"] += " and more"
    rows[1]["reference"] = rows[1]["reference"].upper() + "!"  # another text policy
    write_rows(b / "transcripts-dev.jsonl", rows[:-1])
    found = compare_runs([a, b])
    (agreement,) = found.agreements
    assert (agreement.common, agreement.same, agreement.alone) == (6, 6, 3)
    assert found.utterances == []


def test_worst_differences_come_first_and_no_more_than_asked_for(
    copy: Copy, tmp_path: Path
) -> None:
    rows = lines(copy("c") / "transcripts-dev.jsonl")
    words = [len(row["reference"].split()) for row in rows]
    wrong = {n: " ".join(["y"] * count) for n, count in enumerate(words)}
    a = copy("a", hypotheses=wrong)
    b = copy("b", hypotheses=wrong | {n: " ".join(["x"] * n * words[n]) for n in (1, 2, 4)})
    found = compare_runs([a, b])
    assert [u.id for u in found.utterances] == [rows[n]["id"] for n in (4, 2, 1)]
    assert found.agreements[0].lowest == [2, 0]
    out = tmp_path / "few.html"
    assert compare.main([str(a), str(b), "--out", str(out), "--utterances", "1"]) == 0
    assert len(Page(out).all("article")) == 1


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.yaml", "config.yaml is missing"),
        ("metrics.jsonl", "metrics.jsonl holds no rows"),
        ("summary.json", "not finished"),
        ("tokenizer.json", "tokenizer.json"),
        ("transcripts-dev.jsonl", "only the examples"),
        ("rejects.jsonl", ""),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "bytes"])
def test_a_run_with_missing_or_damaged_files_is_compared_as_far_as_possible(
    file: str, said: str, damage: str, copy: Copy, tmp_path: Path
) -> None:
    a, b = copy("a"), copy("b", {"optim.lr": 5e-4})
    whole = (b / file).read_bytes()
    if damage == "missing":
        (b / file).unlink()
    else:
        cut = len(whole) * 2 // 3
        (b / file).write_bytes(whole[:cut] if damage == "cut" else b"\x00\xff{[" + whole[:cut])
    page = page_of(tmp_path, a, b)
    assert damage != "missing" or said in page.root.text
    settings = cells(page, "Settings that differ") if file != "config.yaml" else []
    assert settings in ([], [["optim.lr", "0.002", "0.0005"]])
    if file == "summary.json" and damage != "missing":
        assert "b: summary.json is damaged" in page.root.text
    if file == "metrics.jsonl" and damage != "missing":
        broken = {"cut": 1, "bytes": 2}[damage]
        assert f"b: unreadable lines of metrics.jsonl left out: {broken}" in page.root.text
    assert page.curve("Train loss", 0)[50] == pytest.approx(
        lines(a / "metrics.jsonl")[-2]["loss"], rel=1e-3
    )


def test_wrong_arguments_end_with_one_line_that_names_them(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(copy("a"))
    other = tmp_path / "notes"
    other.mkdir()
    (other / "notes.txt").write_text("no run")
    for arguments, named in (
        ([], "RUN"),
        ([a], a),
        ([a, str(other)], str(other)),
        ([a, str(tmp_path / "gone")], str(tmp_path / "gone")),
        ([a, a + "/."], a),
        ([a] * 9, "RUN"),
        ([a, "nonsense://bucket/run"], "nonsense://bucket/run"),
    ):
        assert compare.main([*arguments, "--out", str(tmp_path / "page.html")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and named in line
    assert not (tmp_path / "page.html").exists()


def test_runs_of_the_same_name_and_in_a_bucket(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = copy("one/run", {"run.name": "run"})
    b = copy("two/run", {"run.name": "run", "optim.lr": 5e-4})
    with s3_bucket("compared") as uri:
        head, _, options = uri.partition("?")
        for file in b.iterdir():
            if file.is_file():
                (as_path(uri) / "two" / "run" / file.name).write_bytes(file.read_bytes())
        assert (
            compare.main([str(a), f"{head}/two/run?{options}", "--out", str(tmp_path / "p")]) == 0
        )
        found = compare_runs([a, as_path(f"{head}/two/run?{options}")])
    assert found.names == ["one/run", "two/run"]
    assert found.settings == [("optim.lr", ["0.002", "0.0005"])]
    assert found.agreements[0].common == 8
    assert "secret" not in capsys.readouterr().out + (tmp_path / "p").read_text()


def test_the_page_is_one_file_that_no_text_escapes_from(copy: Copy, tmp_path: Path) -> None:
    a, b = copy("a"), copy("b", {"data.prompt": HOSTILE}, hypotheses={0: HOSTILE})
    rows = lines(b / "transcripts-dev.jsonl")
    page = page_of(tmp_path, a, b)
    attributes = [pair for element in page.all("*") for pair in element.attributes.items()]
    outside = {"src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"}
    links = [value for name, value in attributes if name in outside]
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?:|url\(|@import|fetch\(", page.source)
    assert len(page.all("script")) == 1 and page.source.count("alert(1)") >= 2
    assert rows[0]["id"] in page.all("article")[0].text
