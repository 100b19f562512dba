"""Follower of a run's files: reports new rows and events to listeners while the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from omni.errors import first_line
from omni.metrics.run_files import event_files
from omni.storage.append import segment
from omni.storage.path import ObjectPath, StoragePath

METRICS = "metrics.jsonl"
POLL_SECONDS = 0.5
_OBJECT_STORE_POLL_SECONDS = 3.0
_JOIN_SECONDS = 10.0  # Unavailable storage must not delay the end of the run.
Row = dict[str, Any]


class Listener(Protocol):
    """Receiver of every row of metrics.jsonl and of every new event, in order."""

    seen: int  # rows received from an earlier follower

    def rewound(self, rows: int, step: int) -> None:
        """Discard all but the first `rows` rows; those of `step` and later come again.

        Called once before the first row too.
        """

    def rows(self, rows: Sequence[Row]) -> None: ...

    def events(self, events: Sequence[Row]) -> None: ...


class Follower:
    """Follow metrics.jsonl and the events: in a thread as a context manager, or by calls of `poll`.

    metrics.jsonl grows, and is cut back to the checkpoint when workers start again. A listener that
    raises gets nothing more, unless its storage failed; warn: called once with its name and the
    reason.
    """

    def __init__(
        self,
        run_dir: StoragePath,
        listeners: Sequence[Listener],
        warn: Callable[[str], None] = print,
    ) -> None:
        self._run_dir, self._listeners, self._warn = run_dir, list(listeners), warn
        self._interval = POLL_SECONDS if isinstance(run_dir, Path) else _OBJECT_STORE_POLL_SECONDS
        self._metrics = _tail(run_dir / METRICS)
        self._events: dict[StoragePath, _Tail | _ObjectTail] = {}
        self._steps: list[int] = []  # of the rows that listeners have received
        self._reported: set[str] = set()
        self._began = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="follow")
        self._new_events()  # Listeners get no events of earlier drivers.

    def __enter__(self) -> Follower:
        with contextlib.suppress(OSError):
            self.poll()  # Rows that are there already are no news to listeners.
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            with contextlib.suppress(OSError):
                self.poll()

    def poll(self) -> None:
        """Report what is new. Raises OSError if it cannot be read."""
        kept, rows = self._metrics.new()
        if not self._began:
            self._began = True
            self._tell(lambda listener: _catch_up(listener, rows))
        else:
            if kept < len(self._steps):
                del self._steps[kept:]
                step = self._steps[-1] + 1 if self._steps else 0
                self._tell(lambda listener: listener.rewound(kept, step))
            if rows:
                self._tell(lambda listener: listener.rows(rows))
        self._steps += [row["step"] for row in rows]
        events = self._new_events()
        if events:
            self._tell(lambda listener: listener.events(events))

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in list(self._listeners):
            try:
                call(listener)
            except OSError as error:  # Its storage may be available at the next rows.
                self._report(f"{type(listener).__name__} lost rows", error)
            except Exception as error:  # A fault of one view must not end the others, or the run.
                self._listeners.remove(listener)
                self._report(f"{type(listener).__name__} stopped", error)

    def _report(self, what: str, error: Exception) -> None:
        if what not in self._reported:
            self._reported.add(what)
            self._warn(f"{what}: {type(error).__name__}: {first_line(error)}")

    def _new_events(self) -> list[Row]:
        rows = []
        for path in event_files(self._run_dir):
            rows += self._events.setdefault(path, _tail(path)).new()[1]
        return rows

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            with contextlib.suppress(OSError):  # Storage may be available at the next poll.
                self.poll()


def _catch_up(listener: Listener, rows: list[Row]) -> None:
    """Report the rows a listener lacks; a step it has received in part comes again whole."""
    first = min(listener.seen, len(rows))
    while 0 < first < len(rows) and rows[first]["step"] == rows[first - 1]["step"]:
        first -= 1
    after = rows[-1]["step"] + 1 if rows else 0
    listener.rewound(first, rows[first]["step"] if first < len(rows) else after)
    if rows[first:]:
        listener.rows(rows[first:])


def _tail(path: StoragePath) -> _Tail | _ObjectTail:
    return _Tail(path) if isinstance(path, Path) else _ObjectTail(path)


class _Tail:
    """Reader of the complete lines of a growing JSON-lines file, each returned once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self._returned: list[int] = []  # hashes of the lines

    def new(self) -> tuple[int, list[Row]]:
        """Return how many of the returned rows are still in the file, and the rows after them.

        Rows are removed by replacing the file (`keep_lines`): then the new file is compared line by
        line with what was returned.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._inode, self._offset, self._returned = -1, 0, []
            return 0, []
        found: list[tuple[int, Row]] = []
        with file:
            stat = os.fstat(file.fileno())
            replaced = stat.st_ino != self._inode or stat.st_size < self._offset
            if replaced:
                self._inode, self._offset = stat.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # It is still being written.
                    break
                self._offset += len(line)
                row = _parse(line)
                if row is not None:
                    found.append((hash(line), row))
        kept = len(self._returned)
        if replaced:
            pairs = zip(self._returned, found, strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], pairs))
            del self._returned[kept:], found[:kept]
        self._returned += [number for number, _ in found]
        return kept, [row for _, row in found]


class _ObjectTail:
    """As `_Tail`, for a file in segments (omni/storage/append.py); reads those that changed."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._parts: list[tuple[tuple[int | None, int | None], int]] = []  # size and time; rows
        self._returned: list[int] = []  # hashes of the lines

    def new(self) -> tuple[int, list[Row]]:
        """See `_Tail.new`."""
        infos = {info.base_name: info for info in self._path.parent.listing()}
        same = 0
        while same < len(self._parts):
            info = infos.get(segment(self._path, same).name)
            if info is None or self._parts[same][0] != (info.size, info.mtime_ns):
                break
            same += 1
        first = sum(rows for _, rows in self._parts[:same])
        del self._parts[same:]
        found: list[tuple[int, Row]] = []
        while (info := infos.get((part := segment(self._path, len(self._parts))).name)) is not None:
            rows = [
                (hash(line), row)
                for line in part.read_bytes().splitlines(keepends=True)
                if (row := _parse(line)) is not None
            ]
            self._parts.append(((info.size, info.mtime_ns), len(rows)))
            found += rows
        pairs = zip(self._returned[first:], found, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], pairs))
        kept = first + common
        self._returned[kept:] = [number for number, _ in found[common:]]
        return kept, [row for _, row in found[common:]]


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
