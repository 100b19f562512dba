"""The files a run is read from: metrics.jsonl, rejects.jsonl, summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def append_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows as JSON lines in one write."""
    if not rows:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a JSON-lines file; a line cut off by a crash is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop rows atomically: what a killed attempt logged after its last checkpoint is redone."""
    if path.is_file():
        write_text(
            path,
            "".join(
                json.dumps(row, ensure_ascii=False) + "\n"
                for row in read_json_lines(path)
                if keep(row)
            ),
        )


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
