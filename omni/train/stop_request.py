"""Ask the ranks of a run to stop after their current step."""

from __future__ import annotations

import time

from omni.metrics.run_files import write_text
from omni.storage.fence import check_fence
from omni.storage.path import ObjectPath, StoragePath

_POLL_SECONDS = 0.5
_OBJECT_STORE_POLL_SECONDS = 2.0


class StopRequest:
    """File in the run directory that the driver writes and rank 0 polls between steps."""

    def __init__(self, run_dir: StoragePath) -> None:
        self._path = run_dir / ".stop"
        in_object_store = isinstance(run_dir, ObjectPath)
        self._interval = _OBJECT_STORE_POLL_SECONDS if in_object_store else _POLL_SECONDS
        self._polled = 0.0
        self._received = False

    def write(self, reason: str) -> None:
        write_text(self._path, reason)

    def exists(self) -> bool:
        return self._path.exists()

    def clear(self) -> None:
        check_fence(self._path)
        self._path.unlink(missing_ok=True)

    def received(self) -> bool:
        """Poll for the file, at most once per interval; stays True once it was there."""
        if not self._received and time.monotonic() - self._polled >= self._interval:
            self._polled = time.monotonic()
            self._received = self._path.exists()
        return self._received

    def reason(self) -> str:
        try:
            return self._path.read_text()
        except OSError:
            return ""
