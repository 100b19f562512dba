"""The files a run is read from: metrics.jsonl, events.jsonl, rejects.jsonl, summary.json.

Writing waits for storage that is away (omni/storage/retry.py): a line that is lost would be a hole
in the books.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omni.storage import append as growing
from omni.storage.path import StoragePath, write_whole
from omni.storage.retry import retry_storage


def append_json(path: StoragePath, rows: list[dict[str, Any]]) -> None:
    """Append rows as JSON lines: all of them or, where that fails, none."""
    if rows:
        data = _lines(rows)
        retry_storage(lambda: _append(path, data))


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _append(path: StoragePath, data: bytes) -> None:
    if not isinstance(path, Path):
        growing.append(path, data)
        return
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


def read_lines(path: StoragePath) -> Iterator[bytes]:
    """The lines of a file that grows; nothing where there is none."""
    if not isinstance(path, Path):
        yield from growing.read(path)
    elif path.is_file():
        with path.open("rb") as file:
            yield from file


def read_json_lines(path: StoragePath) -> Iterator[dict[str, Any]]:
    """Whole objects of a JSON-lines file; a line cut off by a crash is passed over."""
    for line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def keep_lines(path: StoragePath, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop rows atomically: what a killed attempt logged after its last checkpoint is redone."""
    if not path.is_file():
        return
    kept = _lines(row for row in read_json_lines(path) if keep(row))
    if isinstance(path, Path):
        write_text(path, kept.decode())
    else:
        retry_storage(functools.partial(growing.replace, path, kept))


def remove_lines(path: StoragePath) -> None:
    """A file that grew, where there is one."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    else:
        growing.remove(path)


def write_text(path: StoragePath, text: str) -> None:
    """Write a whole file or none of it."""
    write_bytes(path, text.encode())


def write_bytes(path: StoragePath, data: bytes) -> None:
    """Write a whole file or none of it."""
    retry_storage(lambda: write_whole(path, data))


def write_json(path: StoragePath, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


EVENTS = "events.jsonl"
_EVENTS_OF_RANKS = "events.rank-*.jsonl"  # in object storage, where a file has one writer


def write_event(
    run_dir: StoragePath, event: str, step: int | None = None, rank: int | None = None, **facts: Any
) -> None:
    """What befell a run, kept for its whole life: attempts, faults, skipped steps, its end.

    Unlike metrics.jsonl it is never rewound: what was redone shows twice. rank None: the driver.
    """
    about = {"time": round(time.time(), 3), "run": run_dir.name, "rank": rank}
    row = {**about, "event": event, "step": step, **facts}
    alone = isinstance(run_dir, Path) or rank is None
    name = EVENTS if alone else _EVENTS_OF_RANKS.replace("*", f"{rank:04d}")
    append_json(run_dir / name, [row])


def read_events(run_dir: StoragePath, after: Mapping[str, int] = {}) -> list[dict[str, Any]]:
    """In the order in which they were written, as far as the clocks of nodes agree.

    after: what `count_events` said when those before were there.
    """
    files = event_files(run_dir)
    rows = [row for p in files for row in list(read_json_lines(p))[after.get(p.name, 0) :]]
    return sorted(rows, key=_time) if len(files) > 1 else rows


def count_events(run_dir: StoragePath) -> dict[str, int]:
    """How many there are now, by file."""
    return {path.name: len(list(read_json_lines(path))) for path in event_files(run_dir)}


def event_files(run_dir: StoragePath) -> list[StoragePath]:
    if isinstance(run_dir, Path):
        return [run_dir / EVENTS]
    return [run_dir / EVENTS, *run_dir.glob(_EVENTS_OF_RANKS)]


def _time(row: dict[str, Any]) -> float:
    moment = row.get("time")
    return float(moment) if isinstance(moment, (int, float)) else 0.0


def last_line(error: BaseException) -> str:
    """Of its message, which may be a page of another process's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
