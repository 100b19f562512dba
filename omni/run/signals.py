"""Record SIGTERM and Ctrl-C in the driver, so that a run can stop after its current step."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Signals:
    """Context manager that records SIGTERM and SIGINT instead of acting on them.

    Outside the main thread it does nothing: Python handles signals in the main thread only.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self.repeated = False
        """A second signal came: stop without waiting for a checkpoint."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def interrupted(self) -> bool:
        return self.received == "SIGINT"

    def _record(self, number: int, _frame: object) -> None:
        self.repeated = self.received is not None
        self.received = self.received or signal.Signals(number).name
