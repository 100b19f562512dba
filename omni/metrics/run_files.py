"""Files that describe a run: metrics.jsonl, events.jsonl, rejects.jsonl, summary.json.

Writes wait while storage is unavailable (omni/storage/retry.py), so that no row is lost.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni.storage import append as growing
from omni.storage.atomic import write_atomic
from omni.storage.fence import check_fence, lease_number
from omni.storage.path import StoragePath
from omni.storage.retry import retry_storage
from omni.storage.uri import redact, redacted


def lease_of(path: StoragePath) -> dict[str, int]:
    """Return {"lease": its number} for rows that this process writes under one, else nothing."""
    number = lease_number(path)
    return {} if number is None else {"lease": number}


def append_json(path: StoragePath, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows as JSON lines, all of them or none."""
    if rows:
        data = _lines(rows)
        retry_storage(lambda: _append(path, data))


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _append(path: StoragePath, data: bytes) -> None:
    if not isinstance(path, Path):
        growing.append(path, data)
        return
    check_fence(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size, written = os.fstat(descriptor).st_size, 0
        try:
            written = os.write(descriptor, data)
            while written < len(data):
                written += os.write(descriptor, data[written:])  # the error that cut it short
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                # Not what another thread has appended since, nor under a lock, which a file system
                # that hangs would hold.
                if os.fstat(descriptor).st_size == size + written:
                    os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_lines(path: StoragePath) -> Iterator[bytes]:
    """Read the lines of a file that grows; none if it does not exist."""
    if not isinstance(path, Path):
        yield from growing.read(path)
    elif path.is_file():
        with path.open("rb") as file:
            yield from file


def read_json_lines(path: StoragePath) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON-lines file; skip lines that a crash cut short."""
    for line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def keep_lines(path: StoragePath, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the other rows, atomically: steps after the newest checkpoint are trained again."""
    if not path.is_file():
        return
    kept = _lines(row for row in read_json_lines(path) if keep(row))
    if isinstance(path, Path):
        write_text(path, kept.decode())
    else:
        retry_storage(functools.partial(growing.replace, path, kept))


def remove_lines(path: StoragePath) -> None:
    """Remove a file that grows, if it exists."""
    if isinstance(path, Path):
        check_fence(path)
        path.unlink(missing_ok=True)
    else:
        growing.remove(path)


def write_text(path: StoragePath, text: str) -> None:
    """Write a whole file or none of it."""
    write_bytes(path, text.encode())


def write_bytes(path: StoragePath, data: bytes) -> None:
    """Write a whole file or none of it."""
    retry_storage(lambda: write_atomic(path, data))


def write_json(path: StoragePath, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


EVENTS = "events.jsonl"
_EVENTS_OF_RANKS = "events.rank-*.jsonl"


def write_event(
    run_dir: StoragePath, event: str, step: int | None = None, rank: int | None = None, **facts: Any
) -> None:
    """Append an event of the run: an attempt, a fault, a skipped step, its end.

    Events are never removed, so that those of steps that are trained again show twice. rank: None
    for the driver. Each process has a file of its own: objects cannot be appended to, and appends
    of two clients of a network file system overwrite each other. Older versions wrote one file.
    """
    source = {"time": round(time.time(), 3), "run": run_dir.name, "rank": rank}
    source |= lease_of(run_dir)
    row = {**source, "event": event, "step": step, **redacted(facts)}
    name = EVENTS if rank is None else _EVENTS_OF_RANKS.replace("*", f"{rank:04d}")
    append_json(run_dir / name, [row])


def read_events(run_dir: StoragePath, after: Mapping[str, int] = {}) -> list[dict[str, Any]]:
    """Read the events in the order of their time.

    after: counts of `count_events`; earlier events are left out.
    """
    files = event_files(run_dir)
    rows = [row for p in files for row in list(read_json_lines(p))[after.get(p.name, 0) :]]
    return sorted(rows, key=_time) if len(files) > 1 else rows


def count_events(run_dir: StoragePath) -> dict[str, int]:
    """Count the events in each file."""
    return {path.name: len(list(read_json_lines(path))) for path in event_files(run_dir)}


def event_files(run_dir: StoragePath) -> list[StoragePath]:
    """List the files of events: the driver's, and those of ranks."""
    of_ranks: list[StoragePath] = [*run_dir.glob(_EVENTS_OF_RANKS)]
    return [run_dir / EVENTS, *sorted(of_ranks, key=str)]


def _time(row: dict[str, Any]) -> float:
    moment = row.get("time")
    return float(moment) if isinstance(moment, (int, float)) else 0.0


def last_line(error: BaseException) -> str:
    """Return the last line of a message, which may hold the traceback of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[-1]) if lines else "no message"
