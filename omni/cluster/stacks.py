"""Write what every thread of this process is doing, for a hang that is looked at later."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from omni.storage.path import StoragePath

HANGS = "hangs"
"""Folder of a run directory with the stacks of processes that made no progress."""
_SHARE_BEFORE_END = 0.9
"""Share of a time limit after which a process that it will end writes its stacks."""


def write_stacks(run_dir: StoragePath, who: str, doing: str) -> None:
    """Write the stack of each thread into hangs/WHO.HOST.PID.txt. Raises OSError.

    doing: the activity that makes no progress.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = file.read()
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')} {who}: no progress: {doing}\n\n"
    folder = run_dir / HANGS
    folder.mkdir(exist_ok=True)
    host = socket.gethostname().partition(".")[0]
    (folder / f"{who}.{host}.{os.getpid()}.txt").write_bytes(head.encode() + stacks)


def place_of_thread(thread: int | None) -> str:
    """Return function, file and line that a thread stands at; empty if it has ended."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return ""
    code = frame.f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"


def waits_for_ranks(thread: int | None) -> bool:
    """Tell whether a thread is in a collective call, for lack of another rank perhaps."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if file.endswith("omni/train/distributed.py") or "/torch/distributed/" in file:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def stacks_after(seconds: float, run_dir: StoragePath, who: str, doing: str) -> Iterator[None]:
    """Write the stacks of this process if the block takes nearly `seconds`, its time limit."""

    def write() -> None:
        with contextlib.suppress(Exception):
            write_stacks(run_dir, who, doing)

    timer = threading.Timer(seconds * _SHARE_BEFORE_END, write)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
