"""Read the files of a run for its pages, as far as they can be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from omni.metrics.run_files import read_lines
from omni.report.number_text import finite
from omni.storage.path import StoragePath

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """Content of a run directory; a file that is missing or damaged counts as empty."""

    path: StoragePath
    config_text: str
    metrics: list[Row]
    broken: int
    """Unreadable lines of metrics.jsonl."""
    summary: Row | None
    """None: the run has not finished, or summary.json is damaged."""
    damaged: list[str]
    """Names of files that exist and cannot be parsed."""
    settings: Row
    """Values of config.yaml by dotted name."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def train(self) -> list[Row]:
        return _by_step(self.metrics, "train")

    @property
    def evals(self) -> list[Row]:
        return _by_step(self.metrics, "eval")

    @property
    def figures(self) -> Row:
        """Return the summary; of an unfinished run the values logged last, under the same names."""
        return _so_far(self.train, self.evals) if self.summary is None else self.summary

    @property
    def notes(self) -> list[str]:
        texts = (str(row.get("text")) for row in self.metrics if row.get("kind") == "note")
        return list(dict.fromkeys(texts))

    def transcripts(self, split: str) -> list[Row]:
        return read_rows(self.path / f"transcripts-{split}.jsonl")[0]


def is_run(path: StoragePath) -> bool:
    """Check that a folder holds a file that every run writes first. Raises OSError."""
    return any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl", "summary.json"))


def read_run(path: StoragePath) -> RunRecord:
    """Read a run directory, finished or not. Raises OSError where its storage is unavailable."""
    metrics, broken = read_rows(path / "metrics.jsonl")
    text, summary = _text(path / "summary.json"), None
    config = _text(path / "config.yaml")
    damaged = []
    if text is not None and (summary := _parse(text)) is None:
        damaged.append("summary.json")
    try:
        values = yaml.safe_load(config or "")
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if config is not None and not isinstance(values, dict):
        damaged.append("config.yaml")
    settings = _flat(values) if isinstance(values, dict) else {}
    return RunRecord(path, config or "", metrics, broken, summary, damaged, settings)


def read_rows(path: StoragePath) -> tuple[list[Row], int]:
    """Return the objects of a JSON-lines file, and the number of broken lines."""
    lines = (line.decode(errors="replace") for line in read_lines(path))
    parsed = [_parse(line) for line in lines if line.strip()]
    return [row for row in parsed if row is not None], parsed.count(None)


def _text(path: StoragePath) -> str | None:
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


def _parse(text: str) -> Row | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _flat(values: Row, prefix: str = "") -> Row:
    """Give each value its dotted name; lists and empty objects are values."""
    found: Row = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _by_step(rows: list[Row], kind: str) -> list[Row]:
    """Return the rows of a kind by step. A resumed run repeats steps; the last row counts."""
    last = {r["step"]: r for r in rows if r.get("kind") == kind and finite(r.get("step"))}
    return [last[step] for step in sorted(last)]


def _so_far(train: list[Row], evals: list[Row]) -> Row:
    """Make up the summary of an unfinished run from the last rows logged."""
    last_train, last_eval = ((rows or [{}])[-1] for rows in (train, evals))
    steps, seconds = (
        max((row[key] for row in (last_train, last_eval) if finite(row.get(key))), default=None)
        for key in ("step", "seconds")
    )
    totals = {"steps": steps, "wall_seconds": seconds, "train_loss": last_train.get("loss")}
    return last_train | last_eval | totals
