"""End processes that make no progress, so that the run restarts them.

A process may hang in a library, a collective or a storage call, where no exception reaches it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_CODE = 70
_WARN_AFTER = 0.75
"""Share of the timeout after which a process is asked what it is doing."""


class Watchdog:
    """Ends the process when more than `seconds` pass between two beats.

    report: called first, with the activity that hangs and for how many seconds.
    shorter_timeout: called to ask for a shorter timeout in seconds; None keeps the normal one.
    warn: called once when three quarters of the time have passed, as `report` is, and while all
    ranks of a group still live.
    """

    def __init__(
        self,
        seconds: float,
        report: Callable[[str, float], None],
        shorter_timeout: Callable[[], float | None] = lambda: None,
        warn: Callable[[str, float], None] = lambda doing, seconds: None,
    ) -> None:
        self._seconds, self._report, self._shorter_timeout = seconds, report, shorter_timeout
        self._warn, self._warned = warn, False
        self._doing, self._since = "", float("inf")
        self.thread: int | None = None
        """Thread that beats."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self, doing: str, factor: float = 1.0) -> None:
        """Report progress; the next activity is `doing` and may take `factor` times the timeout."""
        self._doing, self._warned = doing, False
        self.thread = threading.get_ident()
        self._since = time.monotonic() + (factor - 1) * self._seconds

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Suspend the watchdog during work of unknown length, such as an evaluation."""
        self._since = float("inf")
        try:
            yield
        finally:
            self.beat("between two steps")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            passed = time.monotonic() - self._since
            if passed > _WARN_AFTER * self._seconds and not self._warned:
                self._warned = True
                self._call(self._warn, passed)
            if passed <= self._seconds and passed <= (self._shorter_timeout() or self._seconds):
                continue
            self._call(self._report, passed)
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__ or sys.stderr)
            self._stop.wait(2.0)
            os._exit(EXIT_CODE)

    def _call(self, report: Callable[[str, float], None], passed: float) -> None:
        """Report in a thread: a report writes to storage, and storage may be what hangs."""
        threading.Thread(target=report, args=(self._doing, passed), daemon=True).start()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer than `seconds`; Ray then starts another.

    The timer needs no GIL, so it also ends a call into C that never returns. Blocks do not nest.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
