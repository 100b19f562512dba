"""Forwarding of a run's rows to its trackers, kept apart from training.

The driver writes TensorBoard's files. The other trackers share one process beside it, a thread for
each, which follows the files of the run: a package that hangs, crashes or prints does not reach the
driver, and its process can be killed at any time.
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
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omni.config import Config
from omni.metrics.follower import POLL_SECONDS, Follower, Row
from omni.metrics.run_files import write_json
from omni.metrics.trackers import OPEN, StagingFolder, TensorBoard, Tracker, results, scalars
from omni.storage.path import StoragePath
from omni.storage.uri import redact

CLOSE_SECONDS = 20.0  # for rows that were not sent when the run ends
_LOG = "trackers.log"  # what the packages print
Warn = Callable[[str], None]


class Forwarder:
    """Forward rows to one tracker, and keep the number of rows sent in FOLDER/NAME.json.

    open_tracker: takes the tracker's id of an earlier driver. failed: called once with the reason;
    after that nothing more is sent.
    """

    def __init__(
        self,
        folder: StoragePath,
        name: str,
        open_tracker: Callable[[str | None], Tracker],
        failed: Warn,
    ) -> None:
        self._path, self._failed = folder / f"{name}.json", failed
        self._open_tracker = open_tracker
        self._tracker: Tracker | None = None
        self._kept = _read(self._path)
        self.seen = int(self._kept.get("rows", 0))
        self.broken = False

    def open(self) -> None:
        with self._guarded():
            self._tracker = self._open_tracker(self._kept.get("id"))
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
                    self._send(self._tracker, row)
                self._tracker.flush()
                self.seen += len(rows)
                self._keep()

    def events(self, events: Sequence[Row]) -> None:
        """Send nothing: events stay in events.jsonl."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Send the summary of a complete run, and close the tracker."""
        if self._tracker is not None:
            with self._guarded():
                if summary is not None:
                    self._tracker.log(summary["steps"], results(summary))
                self._tracker.close(summary is not None)

    @staticmethod
    def _send(tracker: Tracker, row: Row) -> None:
        if numbers := scalars(row):
            tracker.log(row["step"], numbers)
        if row.get("examples"):
            tracker.examples(row["step"], row["examples"])

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Drop the tracker on any error of its package."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._tracker, self.broken = None, True
            self._failed(_reason(error))

    def _keep(self) -> None:
        id = getattr(self._tracker, "id", None)
        write_json(self._path, {"rows": self.seen, **({"id": id} if id else {})})


class Trackers:
    """Trackers of a run, for its driver; a context manager.

    `tensorboard` listens to a `Follower` of the driver, the others follow the run by themselves.
    warn: called with one line for each tracker that fails.
    """

    def __init__(self, config: Config, warn: Warn) -> None:
        folder = config.run_dir / "trackers"
        folder.mkdir(exist_ok=True)
        self._staging = StagingFolder(folder)
        names = list(dict.fromkeys(config.run.trackers))
        self._process = _Process(names, config, self._staging.folder, warn) if names else None
        self._summary: Mapping[str, Any] | None = None
        self.tensorboard = Forwarder(
            folder,
            "tensorboard",
            lambda _: TensorBoard(config),
            lambda reason: warn(f"TensorBoard gets nothing more of this run: {reason}"),
        )
        self.tensorboard.open()

    def __enter__(self) -> Trackers:
        return self

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Note the summary of a run that is trained to its end."""
        self._summary = summary

    def __exit__(self, *_: object) -> None:
        """Close all trackers, in CLOSE_SECONDS at most."""
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._process is not None:
            self._process.finish(self._summary)
        self.tensorboard.close(self._summary)
        if self._process is not None:
            self._process.join(deadline)
        with contextlib.suppress(OSError):
            self._staging.upload()


class _Process:
    """Driver's end of the process of the trackers."""

    def __init__(self, names: Sequence[str], config: Config, folder: Path, warn: Warn) -> None:
        self._open, self._warn = set(names), warn
        self._log = config.run_dir / "trackers" / _LOG
        self._late = False
        # Spawned: a fork of a process with Ray's threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_follow_run, args=(names, config, folder, theirs), daemon=True, name="trackers"
        )
        self._process.start()
        theirs.close()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch trackers")
        self._thread.start()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        with contextlib.suppress(OSError):  # the process has ended
            self._pipe.send(summary)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._late = True
            self._process.kill()
            self._thread.join(1.0)

    def _watch(self) -> None:
        """Report failures until the process has ended."""
        with contextlib.suppress(EOFError, OSError):  # it has ended
            while True:
                name, reason = self._pipe.recv()
                self._closed(name, reason)
        self._process.join()
        why = f"its process ended with code {self._process.exitcode}"
        if self._late:
            why = f"it was not done {CLOSE_SECONDS:.0f} s after the run"
        for name in sorted(self._open):
            self._closed(name, why)

    def _closed(self, name: str, reason: str | None) -> None:
        """reason: why the tracker failed; None when it is done."""
        if name in self._open and reason is not None:
            self._warn(f"{name} gets nothing more of this run: {reason} ({self._log})")
        self._open.discard(name)


def _follow_run(names: Sequence[str], config: Config, folder: Path, pipe: Connection) -> None:
    """Run all trackers until the driver sends the summary; the main function of the process."""
    os.setsid()  # Ctrl-C in the terminal is for the driver, and no package can ask for a password
    log = os.open(folder / _LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.setdefault("SWANLAB_INTERACTIVE", "false")
    sys.argv = [redact(argument) for argument in sys.argv]  # packages upload it

    sending = threading.Lock()

    def report(name: str, reason: str | None) -> None:
        with sending, contextlib.suppress(OSError):  # the driver was killed
            pipe.send((name, reason))

    end = _End()
    threads = [
        threading.Thread(
            target=_forward, args=(n, config, folder, partial(report, n), end), daemon=True, name=n
        )
        for n in names
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not pipe.poll(POLL_SECONDS):
        pass
    with contextlib.suppress(EOFError, OSError):  # the driver was killed
        end.summary = pipe.recv() if pipe.poll() else None
    end.came.set()
    # Whatever a package still does when Python exits must not outlive the run for long.
    last = threading.Timer(CLOSE_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()
    for thread in threads:
        thread.join(CLOSE_SECONDS)


class _End:
    """End of the run. summary: of a complete run, valid once it came."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.summary: Mapping[str, Any] | None = None


def _forward(
    name: str,
    config: Config,
    folder: Path,
    report: Callable[[str | None], None],
    end: _End,
) -> None:
    """Forward the run to one tracker, from its first row that was not sent, to the end."""
    forwarder = Forwarder(
        config.run_dir / "trackers", name, lambda id: OPEN[name](config, folder, id), report
    )
    forwarder.open()
    follower = Follower(config.run_dir, [forwarder])
    while not forwarder.broken:
        ended = end.came.wait(POLL_SECONDS)
        with contextlib.suppress(OSError):
            follower.poll()
        if ended:
            break
    forwarder.close(end.summary)
    if not forwarder.broken:
        report(None)


def _read(path: StoragePath) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")[:300]
