"""Runs that live in object storage, on a real S3 server on loopback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from safetensors.torch import load_file

from jobs import audit, evaluate
from omni.metrics.follower import METRICS, Follower, Row
from omni.metrics.run_files import (
    append_json,
    count_events,
    keep_lines,
    read_events,
    read_json_lines,
    remove_lines,
    write_event,
)
from omni.report.run_page import write_report
from omni.storage import append as growing
from omni.storage.path import ObjectPath, as_path, join
from omni.train.stop_request import StopRequest
from tests.helpers.loopback_s3 import s3_bucket
from tests.helpers.whole_runs import ROOT, command, curve, ledger, lines, run_job


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("runs") as uri:
        yield uri


@pytest.fixture
def run(bucket: str, tmp_path: Path) -> ObjectPath:
    folder = as_path(bucket) / tmp_path.name
    assert isinstance(folder, ObjectPath)
    return folder


class Heard:
    """What a listener is told."""

    def __init__(self, seen: int = 0) -> None:
        self.seen = seen
        self.told: list[Any] = []

    def rewound(self, rows: int, step: int) -> None:
        self.told.append(("rewound", rows, step))

    def rows(self, rows: Sequence[Row]) -> None:
        self.told += [row["step"] for row in rows]

    def events(self, events: Sequence[Row]) -> None:
        self.told += [event["event"] for event in events]

    def take(self) -> list[Any]:
        told, self.told = self.told, []
        return told


def test_rows_grow_are_taken_back_and_go_away(run: ObjectPath) -> None:
    path = run / METRICS
    assert list(read_json_lines(path)) == []
    rows = [{"step": step, "text": "ü" * step} for step in range(10)]
    for row in rows:
        append_json(path, [row])
    append_json(path, [])
    assert list(read_json_lines(path)) == rows
    keep_lines(path, lambda row: row["step"] < 5)
    append_json(path, [{"step": 5}])
    assert list(read_json_lines(path)) == [*rows[:5], {"step": 5}]
    keep_lines(run / "nothing.jsonl", lambda row: True)
    assert not (run / "nothing.jsonl").exists()
    remove_lines(path)
    assert not path.exists()


def test_every_rank_writes_its_own_events_and_all_are_read_in_order(run: ObjectPath) -> None:
    write_event(run, "override", 0)
    write_event(run, "attempt", 0, rank=0)
    write_event(run, "rank failed", 3, rank=2)
    write_event(run, "failure", 3)
    write_event(run, "attempt", 2, rank=0)
    said = [row["event"] for row in read_events(run)]
    assert said == ["override", "attempt", "rank failed", "failure", "attempt"]
    seen = count_events(run)
    late = {"time": 0.0, "event": "stopped", "step": 4}  # by a clock that is behind
    append_json(run / "events.rank-0002.jsonl", [late])
    write_event(run, "failure", 4)
    assert [row["event"] for row in read_events(run, seen)] == ["stopped", "failure"]
    report = write_report(run).read_text()
    assert "rank failed" in report and "<html" in report


def test_a_run_is_followed(run: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "SEGMENT_BYTES", 100)
    write_event(run, "attempt", 0, rank=0)
    heard = Heard()
    follower = Follower(run, [heard])
    follower.poll()
    assert heard.take() == [("rewound", 0, 0)], "what befell earlier attempts is no news"
    for step in (1, 2, 3, 4, 5, 6):
        append_json(run / METRICS, [{"step": step, "text": "x" * 30}])
        if step == 4:
            follower.poll()
            assert heard.take() == [1, 2, 3, 4]
    assert len(list(growing.segments(run / METRICS))) > 1
    write_event(run, "stalled", 6, rank=1)
    follower.poll()
    assert heard.take() == [5, 6, "stalled"]
    follower.poll()
    assert heard.take() == []

    keep_lines(run / METRICS, lambda row: row["step"] <= 3)
    append_json(run / METRICS, [{"step": 4, "text": "another"}])
    follower.poll()
    assert heard.take() == [("rewound", 3, 4), 4]
    follower.poll()
    assert heard.take() == []


def test_a_wish_to_stop_travels_through_the_bucket(run: ObjectPath) -> None:
    driver, rank = StopRequest(run), StopRequest(run)
    assert not rank.exists()
    driver.write("SIGTERM")
    assert rank.received() and rank.exists() and rank.reason() == "SIGTERM"
    driver.clear()
    driver.clear()
    assert not StopRequest(run).received()


def _download(run: ObjectPath, to: Path) -> Path:
    filesystem, key = run.filesystem
    pafs.copy_files(key, str(to), source_filesystem=filesystem)
    return to


def _corpus(config: Path, bucket: str) -> list[str]:
    """Put the tiny corpus into the bucket, index its training split there, and return the overrides
    that train on it.
    """
    there = as_path(bucket) / "corpus"
    assert isinstance(there, ObjectPath)
    for split in ("train", "dev"):
        rows = lines(config.parent / split / "manifest.jsonl")
        for number, row in enumerate(rows):
            name = f"clips/{split}-{number:04}{Path(row['audio']).suffix}"
            (there / name).upload(Path(row["audio"]))
            rows[number] = {**row, "audio": name}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (there / f"{split}.jsonl").write_text(text)
    made = join(bucket, "index")
    done = subprocess.run(
        [*(sys.executable, "-m", "jobs.index", "--source", (there / "train.jsonl").uri)]
        + ["--out", made],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr
    return ["--data.train", made, "--data.dev", (there / "dev.jsonl").uri]


def _kill_at(
    step: int, config: Path, storage: str, run: ObjectPath, number: int, overrides: list[str]
) -> None:
    """Send the driver and its group a signal once a step has been logged."""
    process = subprocess.Popen(
        command(config, storage, *overrides),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while sum(row["kind"] == "train" for row in read_json_lines(run / METRICS)) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=120)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_continued_bit_for_bit(
    tiny: Path,
    undisturbed: Path,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Recordings, index, features, checkpoints, books, curves and report: nothing of it on disk."""
    corpus = _corpus(tiny, bucket)
    storage = join(bucket, "whole")
    run = as_path(storage) / "run"
    assert isinstance(run, ObjectPath)
    step = random.SystemRandom().randint(8, 30)
    print(f"killing at step {step}")
    _kill_at(step, tiny, storage, run, signal.SIGKILL, corpus)
    assert not (run / "summary.json").exists()
    _kill_at(step + 8, tiny, storage, run, signal.SIGTERM, corpus)
    stopped = [row for row in read_events(run) if row["event"] == "stopped"]
    assert len(stopped) == 1
    run_job(tiny, storage, *corpus)

    copy = _download(run, tmp_path / "copy")
    assert curve(copy) == curve(undisturbed)
    assert ledger(copy) == ledger(undisturbed)
    name = (copy / "checkpoints" / "last").read_text()
    expected = load_file(undisturbed / "checkpoints" / "last" / "model.safetensors")
    found = load_file(copy / "checkpoints" / name / "model.safetensors")
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key].numpy().tobytes() == found[key].numpy().tobytes(), key
    assert list((copy / "tensorboard").iterdir())
    assert "<html" in (copy / "report.html").read_text()
    held = [path.read_bytes() for path in copy.rglob("*") if path.is_file()]
    assert not any(b"secret" in data for data in held), "credentials are not written down"
    assert list((as_path(storage) / "cache").iterdir()), "features lie beside the runs"

    assert audit.main([run.uri]) == 0
    capsys.readouterr()
    best = (run / "checkpoints" / "best").uri
    assert evaluate.main(["--checkpoint", best, "--data", corpus[-1]]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out)["wer"] == summary["dev_wer"]
    assert "complete" in run_job(tiny, storage, *corpus).stdout


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("nowhere://key:secret@bucket/runs", "nowhere"),
        (
            "s3://b/runs?endpoint_override=127.0.0.1:9&scheme=http&region=r",
            "s3://b/runs",
        ),
    ],
)
def test_storage_that_does_not_answer_is_one_line(tiny: Path, storage: str, said: str) -> None:
    done = subprocess.run(
        command(tiny, storage), cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "run.storage" in line and said in line and "secret" not in line
