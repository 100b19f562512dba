"""Identify a process, so that another one can tell whether it has ended."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process on a host. Fields are None where the system does not tell them."""

    host: str
    pid: int
    started: int | None
    """Clock ticks from the host's start to the process's: a pid may be used again."""
    boot: str | None
    """Id of the host's start."""
    namespace: int | None
    """Namespace of the pid: containers count their own, and may share a host's name."""
    job: str | None = None
    """Id of the Ray job that it is the driver of."""

    def is_dead(self) -> bool:
        """Return True if the process is known to have ended; False if it lives or nothing is known.

        Only a process of the same host, start of it, and container can know.
        """
        here = (socket.gethostname(), _boot_id(), _namespace())
        if None in here or here != (self.host, self.boot, self.namespace) or self.started is None:
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"host {self.host}, pid {self.pid}{job}"


def this_process() -> Owner:
    """Describe the calling process."""
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _started(pid), _boot_id(), _namespace(), _job_id())


def _started(pid: int) -> int | None:
    """Return the start time of a process; None if it has ended, or the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # The name before it may hold anything.
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _job_id() -> str | None:
    """Return the submission id that Ray's job server gave this driver."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        found = config["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)
