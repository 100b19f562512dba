"""Stopping in order: signals that the driver gets, and how ranks learn that they should end."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from omni.metrics.run_files import write_text
from omni.storage.path import ObjectPath, Place

_LOOK_SECONDS = 0.5
_LOOK_AFAR_SECONDS = 2.0  # a request to object storage


class StopRequest:
    """A file in the run's directory: the driver writes it, rank 0 looks for it between steps."""

    def __init__(self, run_dir: Place) -> None:
        self._path = run_dir / ".stop"
        afar = isinstance(run_dir, ObjectPath)
        self._every = _LOOK_AFAR_SECONDS if afar else _LOOK_SECONDS
        self._looked = 0.0
        self._found = False

    def write(self, why: str) -> None:
        write_text(self._path, why)

    def exists(self) -> bool:
        return self._path.exists()

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)

    def asked(self) -> bool:
        """True once the file is there; looks now and then only."""
        if not self._found and time.monotonic() - self._looked >= self._every:
            self._looked = time.monotonic()
            self._found = self._path.exists()
        return self._found

    def why(self) -> str:
        try:
            return self._path.read_text()
        except OSError:
            return ""


class Signals:
    """SIGTERM and Ctrl-C of the driver, as facts to be acted upon.

    Use as a context manager around the part that can stop in order; outside the main thread
    signals are left alone.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.impatient = False  # a second signal came
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def interrupted(self) -> bool:
        return self.received == "SIGINT"

    def _note(self, number: int, _frame: object) -> None:
        self.impatient = self.received is not None
        self.received = self.received or signal.Signals(number).name
