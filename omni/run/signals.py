"""Record SIGTERM and Ctrl-C in the driver, so that a run can stop after its current step."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Signals:
    """Context manager that records SIGTERM and SIGINT, and says so, instead of acting on them.

    grace_seconds: time that the run has to finish its step. Outside the main thread it does
    nothing: Python handles signals in the main thread only.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
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
        grace = f"at most {self._grace_seconds:.0f} s; once more to stop at once"
        doing = "stopping" if self.repeated else f"finishing the step, then a checkpoint ({grace})"
        # A handler must not use buffered output, which it may have interrupted.
        os.write(2, f"\n{signal.Signals(number).name}: {doing}\n".encode())
