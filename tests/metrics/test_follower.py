"""A view that fails is dropped and named; the others and the run go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni.metrics.follower import Follower


class View:
    """Listener that keeps the steps it gets."""

    seen = 0

    def __init__(self) -> None:
        self.steps: list[int] = []

    def rewound(self, rows: int, step: int) -> None:
        del self.steps[rows:]

    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        self.steps += [row["step"] for row in rows]

    def events(self, events: Sequence[dict[str, Any]]) -> None:
        return None


class Broken(View):
    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        super().rows(rows)
        raise ValueError("row 3\ncannot be drawn")


class NoSpace(View):
    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        super().rows(rows)
        raise OSError("no space left")


def _add(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step}) + "\n")


def test_a_view_that_fails_is_named_once_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    broken, full, whole = Broken(), NoSpace(), View()
    follower = Follower(tmp_path, [broken, full, whole], said.append)
    follower.poll()
    for step in (1, 2, 3):
        _add(tmp_path, step)
        follower.poll()
    assert whole.steps == [1, 2, 3]
    assert broken.steps == [1], "nothing after its fault"
    assert full.steps == [1, 2, 3], "its storage may come back"
    assert len(said) == 2
    assert "Broken" in said[0] and "ValueError" in said[0] and "row 3" in said[0]
    assert "NoSpace" in said[1] and "no space left" in said[1]
