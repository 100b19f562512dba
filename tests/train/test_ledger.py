"""The ledger says what every step consumed; a new attempt drops what it will do again."""

from __future__ import annotations

from pathlib import Path

from omni.train.ledger import Ledger, rewind_ledgers
from tests.helpers.whole_runs import lines


def test_bins_of_a_step_without_an_update_are_marked(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1)
    for step in (1, 2):
        ledger.begin_step(step)
        ledger.add(10 * step, [step], [f"id-{step}"])
    assert ledger.mark_skipped("the loss is nan") == [{"bin": 20, "ids": ["id-2"]}]
    ledger.write()
    ledger.write()
    assert lines(tmp_path / "ledger" / "rank-0001.jsonl") == [
        {"step": 1, "bin": 10, "utterances": [1]},
        {"step": 2, "bin": 20, "utterances": [2], "skipped": "the loss is nan"},
    ]


def test_rewinding_drops_later_steps_of_all_ranks(tmp_path: Path) -> None:
    assert rewind_ledgers(tmp_path, 0) == 0
    for rank, steps in enumerate(([1, 2, 3], [1, 2])):
        ledger = Ledger(tmp_path, rank)
        for step in steps:
            ledger.begin_step(step)
            ledger.add(step, [], [])
        ledger.write()
    assert rewind_ledgers(tmp_path, 1) == 2
    for rank in range(2):
        path = tmp_path / "ledger" / f"rank-{rank:04d}.jsonl"
        assert [row["step"] for row in lines(path)] == [1]
    assert rewind_ledgers(tmp_path, 5) == 0
