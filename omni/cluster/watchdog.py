"""A rank that makes no progress ends its process: a restart is cheaper than a silent night.

A hang can sit in a library, a collective or a storage call, where no exception reaches it.
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


class Watchdog:
    """Ends the process when `seconds` pass between two beats.

    report: called before, with what was being done and for how long.
    hurry: seconds that are enough in a situation that it finds, else None.
    """

    def __init__(
        self,
        seconds: float,
        report: Callable[[str, float], None],
        hurry: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._seconds, self._report, self._hurry = seconds, report, hurry
        self._doing, self._since = "", float("inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Progress; what comes next is `doing`, and may take `patience` times as long as usual."""
        self._doing = doing
        self._since = time.monotonic() + (patience - 1) * self._seconds

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """For work of unknown length, such as an evaluation."""
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
            if passed <= self._seconds and passed <= (self._hurry() or self._seconds):
                continue
            # Reporting writes to storage, which may be what hangs.
            threading.Thread(target=self._report, args=(self._doing, passed), daemon=True).start()
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__ or sys.stderr)
            self._stop.wait(2.0)
            os._exit(EXIT_CODE)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer: its owner starts another and tries again.

    The timer needs no GIL, so it also ends a call into C that never returns. One block at a time.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
