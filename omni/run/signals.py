"""Note SIGTERM and Ctrl-C in the driver, so that a run can end after its step."""

from __future__ import annotations

import signal
import threading
from typing import Any


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
