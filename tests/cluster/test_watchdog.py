"""Processes that hang are ended, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from omni.cluster.watchdog import EXIT_CODE

_RANK = """
import sys, time
from omni.cluster.watchdog import Watchdog
dog = Watchdog(1.0, lambda doing, seconds: open(sys.argv[1], "w").write(doing))
for step in range(30):
    dog.beat(f"training step {step}")
    time.sleep(0.1)
print("progress", flush=True)
with dog.off():
    time.sleep(2.5)
print("evaluated", flush=True)
dog.beat("waiting for a block")
time.sleep(60)
"""

_CLOSED = """
import time
from omni.cluster.watchdog import Watchdog
dog = Watchdog(0.3, lambda doing, seconds: None)
dog.beat("the last step")
dog.close()
time.sleep(1.5)
print("alive", flush=True)
"""

_STAGE = """
import ctypes, time
from omni.cluster.watchdog import limited
with limited(1.0):
    time.sleep(0.2)
time.sleep(1.5)
print("in time", flush=True)
with limited(1.0):
    ctypes.PyDLL(None).sleep(60)  # a call into C that keeps the GIL
"""


def test_a_rank_without_progress_says_what_it_did_and_ends(tmp_path: Path) -> None:
    said = tmp_path / "said"
    done = subprocess.run(
        [sys.executable, "-c", _RANK, str(said)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_CODE
    assert done.stdout.split() == ["progress", "evaluated"]
    assert said.read_text() == "waiting for a block"
    assert '"<string>"' in done.stderr, "a traceback says where it hung"


def test_a_call_into_c_that_never_returns_is_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STAGE], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1
    assert done.stdout.split() == ["in", "time"]
    assert "Timeout" in done.stderr


def test_a_closed_watchdog_bites_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CLOSED], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["alive"]
