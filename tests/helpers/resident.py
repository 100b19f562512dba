"""Peak resident memory of this process, as its operating system counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path


class PeakMemory:
    """Bytes of the peak since it was made or last taken, less what the process held at first."""

    def __init__(self) -> None:
        _forget_peak()
        self._before = _status("VmRSS")

    def take(self) -> int:
        found = _status("VmHWM") - self._before
        _forget_peak()
        return found


def _forget_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # What was freed is not of the next peak.
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
