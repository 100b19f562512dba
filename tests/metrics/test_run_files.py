"""The files of a run outlive a crash in the middle of a write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from omni.metrics import run_files
from omni.metrics.run_files import append_json, keep_lines, read_json_lines, write_json, write_text


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    append_json(path, [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0}])
    return path


def test_rows_are_appended_and_read_in_order(log: Path) -> None:
    append_json(log, [{"step": 30, "text": "Größe\nzwei \u2028 drei"}])
    append_json(log, [])
    assert [row["step"] for row in read_json_lines(log)] == [10, 20, 30]
    assert list(read_json_lines(log))[-1]["text"] == "Größe\nzwei \u2028 drei"
    assert "Größe" in log.read_text(encoding="utf-8"), "written for people"


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert list(read_json_lines(tmp_path / "nowhere.jsonl")) == []
    append_json(tmp_path / "nowhere.jsonl", [])
    keep_lines(tmp_path / "nowhere.jsonl", lambda row: True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_line_cut_off_by_a_crash_is_passed_over(log: Path, cut: int) -> None:
    log.write_bytes(log.read_bytes()[:-cut])
    append = log.read_bytes().endswith(b"}")
    assert [row["step"] for row in read_json_lines(log)] == [10] + [20] * append


def test_a_line_cut_off_inside_a_letter_is_passed_over(log: Path) -> None:
    append_json(log, [{"step": 30, "text": "für"}])
    data = log.read_bytes()
    log.write_bytes(data[: data.index("ü".encode()) + 1])
    assert [row["step"] for row in read_json_lines(log)] == [10, 20]


def test_rows_after_a_checkpoint_can_be_dropped(log: Path) -> None:
    append_json(log, [{"step": 30, "text": "für"}])
    log.write_bytes(log.read_bytes() + b'{"step": 15, "lo')
    keep_lines(log, lambda row: row["step"] != 20)
    assert log.read_text() == '{"step": 10, "loss": 2.5}\n{"step": 30, "text": "für"}\n'
    append_json(log, [{"step": 40}])
    assert [row["step"] for row in read_json_lines(log)] == [10, 30, 40]


def test_a_filter_that_fails_leaves_the_file_as_it_was(log: Path) -> None:
    before = log.read_bytes()
    append_json(log, [{"no step": 1}])
    with pytest.raises(KeyError):
        keep_lines(log, lambda row: row["step"] > 10)
    assert log.read_bytes().startswith(before)
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"wer": None, "text": "Größe"})
    write_json(path, {"wer": 0.5})
    assert json.loads(path.read_text()) == {"wer": 0.5}
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair \ud83d")
    assert json.loads(path.read_text()) == {"wer": 0.5}, "a failed write leaves the old file"


def test_rows_of_an_append_that_fails_at_its_end_are_not_kept(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fsync, calls = log.read_bytes(), os.fsync, []

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError):
        run_files._append(log, b'{"step": 30}\n')
    assert log.read_bytes() == before
    run_files._append(log, b'{"step": 30}\n')
    assert [row["step"] for row in read_json_lines(log)] == [10, 20, 30]
