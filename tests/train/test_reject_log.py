"""Rejects are written once, counted by reason, and limited by `data.max_rejects`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from omni.stream.schema import EncodedRow
from omni.train.reject_log import RejectLog, TooManyRejects
from tests.helpers.whole_runs import lines


def _row(*ids: str, reason: str = "silent", noted: bool = False) -> EncodedRow:
    row: dict[str, Any] = {
        "split": "train",
        "ids": [*ids, "good"],
        "uris": [f"{name}.wav" for name in (*ids, "good")],
        "errors": [*[f"{reason}\nof {name}" for name in ids], None],
        "notes": [*[None for _ in ids], "one channel\nchannel 2 of 2" if noted else None],
    }
    return cast(EncodedRow, row)


def test_an_utterance_is_rejected_once(tmp_path: Path) -> None:
    log = RejectLog(tmp_path, 0, 0.5, 10)
    for step in (1, 9):
        log.add([_row("a"), _row("b", reason="unreadable")], step)
        log.share()
    assert log.counts == {"silent": 1, "unreadable": 1}
    assert lines(tmp_path / "rejects.jsonl") == [
        {"id": i, "uri": f"{i}.wav", "reason": r, "detail": f"of {i}", "split": "train", "step": 1}
        for i, r in (("a", "silent"), ("b", "unreadable"))
    ]


def test_more_than_the_allowed_share_is_an_error(tmp_path: Path) -> None:
    log = RejectLog(tmp_path, 0, 0.2, 10)
    log.add([_row("a", "b")], 1)
    log.share()
    log.add([_row("c")], 2)
    with pytest.raises(TooManyRejects, match=r"data\.max_rejects: 3 of 10\b.*\b20%"):
        log.share()
    assert len(lines(tmp_path / "rejects.jsonl")) == 3


def test_an_attempt_goes_on_counting_where_its_checkpoint_stands(tmp_path: Path) -> None:
    log = RejectLog(tmp_path, 0, 0.2, 10)
    (tmp_path / "rejects.jsonl").write_text('{"id": "of the index", "reason": "empty text"}\n')
    log.add([_row("a")], 1)
    log.add([_row("b")], 5)
    log.share()
    again = RejectLog(tmp_path, 0, 0.2, 10)
    again.rewind(4)
    again.restore()
    assert [row["id"] for row in lines(tmp_path / "rejects.jsonl")] == ["of the index", "a"]
    assert again.counts == {"silent": 1}
    again.add([_row("a", "b")], 5)
    again.share()
    assert again.counts == {"silent": 2}
    other_rank = RejectLog(tmp_path, 1, 0.2, 10)
    other_rank.add([_row("z")], 6)
    other_rank.share()
    assert "z" not in (tmp_path / "rejects.jsonl").read_text(), "rank 0 writes for all"


def test_choices_of_the_decoder_are_noted_once_and_counted(tmp_path: Path) -> None:
    log = RejectLog(tmp_path, 0, 0.5, 10)
    for step in (1, 5, 9):
        log.add([_row("a", noted=True)], step)
        log.share()
    assert log.notes == {"one channel": 1} and log.counts == {"silent": 1}
    assert lines(tmp_path / "notes.jsonl") == [
        {
            "id": "good",
            "uri": "good.wav",
            "note": "one channel",
            "detail": "channel 2 of 2",
            "split": "train",
            "step": 1,
        }
    ]
    again = RejectLog(tmp_path, 0, 0.5, 10)
    again.rewind(4)
    again.restore()
    assert again.notes == {"one channel": 1}
    again.rewind(0)
    again.restore()
    assert again.notes == {} and lines(tmp_path / "notes.jsonl") == []
