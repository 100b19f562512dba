"""Where the seconds of training go, by phase."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

PHASES = ("wait", "copy", "forward", "backward", "optimizer", "evaluate", "checkpoint")


class Stopwatch:
    """Seconds by phase since the last `take`.

    Work on a GPU is measured there, by events that nobody waits for until `take` reads them: the
    host only says what is to be done, and is long ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str, on_device: bool = True) -> Iterator[None]:
        """on_device: what is measured happens on the GPU, where there is one."""
        if self._gpu and on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, begin, end))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds of every phase, and forget them. Waits for the GPU's last event."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        taken = {name: self._seconds.get(name, 0.0) for name in PHASES}
        self._seconds.clear()
        return taken
