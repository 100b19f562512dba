"""Handing a run's rows to its trackers, without the training ever noticing.

TensorBoard's files are written by the driver. Any other tracker runs in a process of its own, which
follows the run's files: it may hang, crash or print, and can be ended at any time.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omni.config import Config
from omni.metrics.follower import POLL_SECONDS, Follower, Row
from omni.metrics.run_files import write_json
from omni.metrics.trackers import OPEN, Scratch, TensorBoard, Tracker, results, scalars
from omni.storage.path import StoragePath, redact

CLOSE_SECONDS = 20.0  # for what has not been sent when a run ends
Say = Callable[[str], None]


class Recorder:
    """Hands rows to one tracker, and keeps how far it came in FOLDER/NAME.json.

    tracker: opens it, given the id that it had before. failed: told once, with the reason; from
    then on it gets nothing.
    """

    def __init__(
        self, folder: StoragePath, name: str, tracker: Callable[[str | None], Tracker], failed: Say
    ) -> None:
        self._path, self._failed = folder / f"{name}.json", failed
        self._open = tracker
        self._tracker: Tracker | None = None
        self._kept = _read(self._path)
        self.seen = int(self._kept.get("rows", 0))
        self.broken = False

    def open(self) -> None:
        with self._guarded():
            self._tracker = self._open(self._kept.get("id"))
            self._keep()

    def rewound(self, rows: int, step: int) -> None:
        if self._tracker is not None:
            with self._guarded():
                self._tracker.rewind(step)
                self.seen = rows
                self._keep()

    def rows(self, rows: Sequence[Row]) -> None:
        if self._tracker is not None:
            with self._guarded():
                for row in rows:
                    self._take(self._tracker, row)
                self._tracker.flush()
                self.seen += len(rows)
                self._keep()

    def events(self, events: Sequence[Row]) -> None:
        """They stay in events.jsonl."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """summary: of a run that is complete."""
        if self._tracker is not None:
            with self._guarded():
                if summary is not None:
                    self._tracker.log(summary["steps"], results(summary))
                self._tracker.close(summary is not None)

    @staticmethod
    def _take(tracker: Tracker, row: Row) -> None:
        if figures := scalars(row):
            tracker.log(row["step"], figures)
        if row.get("examples"):
            tracker.examples(row["step"], row["examples"])

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever a package does wrong ends its part, and nothing else."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._tracker, self.broken = None, True
            self._failed(_reason(error))

    def _keep(self) -> None:
        id = getattr(self._tracker, "id", None)
        write_json(self._path, {"rows": self.seen, **({"id": id} if id else {})})


class Trackers:
    """All trackers of a run, for its driver. Use as a context manager; `tensorboard` is to be told
    what is new by a `Follower`, the others follow by themselves.

    warn: gets one line for a tracker that fails.
    """

    def __init__(self, config: Config, warn: Say) -> None:
        folder = config.run_dir / "trackers"
        folder.mkdir(exist_ok=True)
        self._scratch = Scratch(folder)
        names = dict.fromkeys(config.run.trackers)
        self._others = [_Other(name, config, self._scratch.folder, warn) for name in names]
        self._summary: Mapping[str, Any] | None = None
        self.tensorboard = Recorder(
            folder,
            "tensorboard",
            lambda _: TensorBoard(config),
            lambda reason: warn(f"TensorBoard gets nothing more of this run: {reason}"),
        )
        self.tensorboard.open()

    def __enter__(self) -> Trackers:
        return self

    def complete(self, summary: Mapping[str, Any]) -> None:
        """The run is trained to its end."""
        self._summary = summary

    def __exit__(self, *_: object) -> None:
        """Takes CLOSE_SECONDS at most, for all together."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for other in self._others:
            other.finish(self._summary)
        self.tensorboard.close(self._summary)
        for other in self._others:
            other.join(deadline)
        with contextlib.suppress(OSError):
            self._scratch.upload()


class _Other:
    """A tracker's process, seen from the driver."""

    def __init__(self, name: str, config: Config, folder: Path, warn: Say) -> None:
        self._name, self._warn = name, warn
        self._log = config.run_dir / "trackers" / f"{name}.log"
        self._late = False
        # Spawned: a forked copy of a process with Ray's threads could stand still.
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_track, args=(name, config, folder, there), daemon=True, name=name
        )
        self._process.start()
        there.close()
        self._thread = threading.Thread(target=self._watch, daemon=True, name=f"watch {name}")
        self._thread.start()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        with contextlib.suppress(OSError):  # it ended before
            self._here.send(summary)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._late = True
            self._process.kill()
            self._thread.join(1.0)

    def _watch(self) -> None:
        """Until the process has ended; only this thread waits for it."""
        reason = None
        with contextlib.suppress(EOFError, OSError):  # it has ended
            reason = self._here.recv()
            self._say(reason)
        self._process.join()
        if reason is None and self._late:
            self._say(f"it was not done {CLOSE_SECONDS:.0f} s after the run")
        elif reason is None and self._process.exitcode != 0:
            self._say(f"its process ended with code {self._process.exitcode}")

    def _say(self, reason: str) -> None:
        self._warn(f"{self._name} gets nothing more of this run: {reason} ({self._log})")


def _track(name: str, config: Config, folder: Path, pipe: Connection) -> None:
    """The whole life of a tracker's process: from its start until the driver sends the summary."""
    os.setsid()  # Ctrl-C in the terminal is the driver's; and nothing can ask for a password
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.setdefault("SWANLAB_INTERACTIVE", "false")
    sys.argv = [redact(argument) for argument in sys.argv]  # packages send it along

    books = config.run_dir / "trackers"
    recorder = Recorder(books, name, lambda id: OPEN[name](config, folder, id), pipe.send)
    recorder.open()
    follower = Follower(config.run_dir, [recorder])
    while not recorder.broken and not pipe.poll(POLL_SECONDS):
        with contextlib.suppress(OSError):
            follower.poll()
    summary = None
    with contextlib.suppress(EOFError, OSError):  # the driver was killed
        summary = None if recorder.broken else pipe.recv()
    # What a package still does when Python exits must not outlive the run for long.
    last = threading.Timer(CLOSE_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()
    with contextlib.suppress(OSError):
        follower.poll()
    recorder.close(summary)


def _read(path: StoragePath) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")[:300]
