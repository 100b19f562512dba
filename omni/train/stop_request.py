"""Ask the ranks of a run to stop after their step."""

from __future__ import annotations

import time

from omni.metrics.run_files import write_text
from omni.storage.path import ObjectPath, StoragePath

_POLL_SECONDS = 0.5
_OBJECT_STORE_POLL_SECONDS = 2.0


class StopRequest:
    """A file in the run's directory: the driver writes it, rank 0 looks for it between steps."""

    def __init__(self, run_dir: StoragePath) -> None:
        self._path = run_dir / ".stop"
        afar = isinstance(run_dir, ObjectPath)
        self._every = _OBJECT_STORE_POLL_SECONDS if afar else _POLL_SECONDS
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
