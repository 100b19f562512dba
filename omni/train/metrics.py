"""The files a run is read from: metrics.jsonl, events.jsonl, rejects.jsonl, summary.json.

Writing waits for storage that is away (omni/retry.py): a line that is lost would be a hole in the
books.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omni.retry import patiently


def append_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows as JSON lines: all of them or, where that fails, none."""
    if rows:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        patiently(lambda: _append(path, text.encode()))


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, data)
        if written < len(data):
            try:
                written += os.write(descriptor, data[written:])  # the error that cut it short
            finally:
                if written < len(data):
                    os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole objects of a JSON-lines file; a line cut off by a crash is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


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

    def write() -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    patiently(write)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


EVENTS = "events.jsonl"


def write_event(
    run_dir: Path, event: str, step: int | None = None, rank: int | None = None, **facts: Any
) -> None:
    """What befell a run, kept for its whole life: attempts, faults, skipped steps, its end.

    Unlike metrics.jsonl it is never rewound: what was redone shows twice. rank None: the driver.
    """
    about = {"time": round(time.time(), 3), "run": run_dir.name, "rank": rank}
    row = {**about, "event": event, "step": step, **facts}
    append_json(run_dir / EVENTS, [row])


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(run_dir / EVENTS))


def last_line(error: BaseException) -> str:
    """Of its message, which may be a page of another process's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
