"""omni annotate as people run it: labels, what has none, and what is not measured twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import omni
from jobs import annotate
from omni.corpus.index import build_index
from omni.corpus.labels import labels_of
from omni.storage.path import as_path, join
from omni.texture import measured
from tests.helpers.loopback_s3 import s3_bucket

ROOT = Path(omni.__file__).parents[1]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine real clips at three levels of two speakers, one with a digit in its text, and silence
    after a click, which is no speech."""
    folder = tmp_path_factory.mktemp("corpus")
    source = build_index(["embedded:dev"]).table.to_pylist()
    rows = [row for row in source if row["samples"] > 24_000 and row["text"].isascii()][:9]
    manifest = []
    for number, row in enumerate(rows):
        audio, rate = soundfile.read(row["uri"])
        soundfile.write(folder / f"{number}.flac", audio / 2 ** (number % 3), rate)
        text = "Room 7." if number == 4 else "Only letters here."
        more = {"speaker": "ab"[number % 2], "mood": "calm"}
        manifest.append({"id": str(number), "audio": f"{number}.flac", "text": text, **more})
    click = np.zeros(16_000)
    click[8_000] = 0.5
    soundfile.write(folder / "click.wav", click, 16_000)
    manifest.append({"id": "click", "audio": "click.wav", "text": "Nothing."})
    _write(folder, "all.jsonl", manifest)
    _write(folder, "five.jsonl", manifest[:5])
    return folder


@pytest.fixture(scope="module")
def annotated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("annotated") / "out"
    done = annotate.main([str(corpus / "all.jsonl"), "--out", str(out), "--keep", "mood"])
    assert done == 0
    return out


def _labels(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: labels_of(row) for row in build_index([str(folder)]).table.to_pylist()}


def test_an_annotated_index_is_a_corpus_with_labels(annotated: Path) -> None:
    labels = _labels(annotated)
    assert list(labels) == [*map(str, range(9)), "click"]
    assert all(labels[str(n)]["mood"] == "calm" for n in range(9))
    louder = [labels[str(n)]["energy_db"] for n in range(9)]
    # Whole clips of one speaker differ less in level than the halved amplitudes.
    assert np.mean(louder[0::3]) > np.mean(louder[1::3]) > np.mean(louder[2::3])
    assert {labels[str(n)]["energy_class"] for n in (0, 3, 6)} == {"high"}
    assert all(120 < labels[str(n)]["pitch_hz"] < 300 for n in range(9))  # a woman
    letters = sum(map(str.isalpha, "Only letters here."))
    assert labels["0"]["characters_per_second"] < letters
    assert labels["0"]["pause_class"] in ("none", "one", "several")
    assert labels["click"] == {} and "rate_class" not in labels["4"]
    about = json.loads((annotated / "index.json").read_text())
    assert about["labels"]["pitch_class"] == 9 and about["labels"]["mood"] == 9


def test_what_has_no_value_is_counted_by_reason(annotated: Path) -> None:
    measures = json.loads((annotated / "annotations.json").read_text())["measures"]
    assert measures["pitch"]["missing"] == {"no speech": 1}
    assert measures["rate"]["missing"] == {"digits in the text": 1, "no speech": 1}
    assert measures["energy"]["classes"] == {"high": 3, "low": 3, "mid": 3}


def test_an_index_folder_is_annotated_with_the_bounds_of_another(
    annotated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other"
    source = str(annotated / "source")
    arguments = [source, "--out", str(out), "--with", "energy", "--like", str(annotated)]
    shutil.copytree(annotated / "measured", out / "measured")
    assert annotate.main(arguments) == 0
    assert "0 of 1 unit measured" in capsys.readouterr().out
    mine, others = _labels(out), _labels(annotated)
    assert set(mine["0"]) == {"energy_db", "energy_class", "mood", "speaker"}
    assert all(mine[name].items() <= others[name].items() for name in mine)


def test_an_index_folder_in_a_bucket_is_annotated(annotated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(annotated / "measured", out / "measured")
    with s3_bucket("annotate") as uri:
        for path in (annotated / "source").rglob("*"):
            if path.is_file():
                target = join(join(uri, "index"), str(path.relative_to(annotated / "source")))
                as_path(target).write_bytes(path.read_bytes())
        assert annotate.main([join(uri, "index"), "--out", str(out), "--with", "energy"]) == 0
    mine, others = _labels(out), _labels(annotated)
    assert set(mine["0"]) == {"energy_db", "energy_class", "mood", "speaker"}
    assert all(mine[name].items() <= others[name].items() for name in mine)


def test_a_recording_that_is_gone_has_no_labels_but_stays(
    corpus: Path, annotated: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    assert annotate.main([str(copy / "five.jsonl"), "--out", str(tmp_path / "a")]) == 0
    (copy / "2.flac").unlink()
    again = [str(tmp_path / "a" / "source"), "--out", str(tmp_path / "b")]
    assert annotate.main(again) == 0
    labels = _labels(tmp_path / "b")
    assert len(labels) == 5 and set(labels["2"]) == {"speaker"}
    measures = json.loads((tmp_path / "b" / "annotations.json").read_text())["measures"]
    assert measures["energy"]["missing"] == {"unreadable": 1}


def test_only_new_units_are_measured(
    corpus: Path,
    annotated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measured, "UNIT_ROWS", 5)
    first = [str(corpus / "five.jsonl"), "--out", str(tmp_path / "out")]
    assert annotate.main(first) == 0
    assert "1 of 1 unit measured" in capsys.readouterr().out
    more = [str(corpus / "all.jsonl"), "--out", str(tmp_path / "out"), "--keep", "mood"]
    assert annotate.main(more) == 0
    assert "1 of 2 units measured" in capsys.readouterr().out
    assert _labels(tmp_path / "out") == _labels(annotated)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{annotated}"], "pitch_hz"),
        (["{annotated}", "{corpus}/all.jsonl"], "one index folder"),
        (["{annotated}/source", "--like", "{corpus}"], "--like"),
        (["{annotated}/source", "--like", "{annotated}", "--within", "speaker"], "--like"),
        (["{corpus}/none.jsonl"], "none.jsonl"),
        (["{annotated}/source", "--with", "pitch,timbre"], "timbre"),
    ],
)
def test_wrong_input_ends_in_one_line(
    arguments: list[str],
    named: str,
    annotated: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [text.format(annotated=annotated, corpus=corpus) for text in arguments]
    try:
        code: Any = annotate.main([*given, "--out", str(tmp_path / "out")])
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr().err
    assert code == 2 and named in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.slow
def test_a_killed_job_continues(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["embedded:train", "--out", str(out)]
    command = [sys.executable, "-m", "jobs.annotate", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    while not list(out.glob("measured/*.parquet")):
        assert job.poll() is None
        time.sleep(0.2)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    there = {path: path.stat().st_mtime_ns for path in out.glob("measured/*.parquet")}
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert f"{3 - len(there)} of 3 units measured" in again.stdout
    assert len(_labels(out)) == 424
