"""A process without progress says where it stands."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from omni.cluster.stacks import (
    HANGS,
    place_of_thread,
    stacks_after,
    waits_for_ranks,
    write_stacks,
)
from omni.cluster.timeouts import (
    block_timeout,
    collective_timeout,
    health_timeout,
    rank_timeout,
)
from omni.cluster.watchdog import EXIT_CODE
from omni.run.failures import root_cause
from omni.train import distributed

_HANGS = """
import sys, threading, time
from pathlib import Path
from omni.cluster.stacks import place_of_thread, write_stacks
from omni.cluster.watchdog import Watchdog

def warn(doing, seconds):
    write_stacks(Path(sys.argv[1]), "rank-0001", doing)
    print(place_of_thread(dog.thread), flush=True)

dog = Watchdog(2.0, lambda doing, seconds: print("ends", flush=True), warn=warn)

def culprit():
    dog.beat("training step 7")
    time.sleep(60)

threading.Thread(target=culprit, daemon=True).start()
time.sleep(60)
"""


def _names(folder: Path) -> list[str]:
    return [path.name.partition(".")[0] for path in sorted(folder.glob("*"))]


def test_limits_end_the_cause_before_what_waits_for_it() -> None:
    limits = [
        limit(100.0) for limit in (block_timeout, collective_timeout, rank_timeout, health_timeout)
    ]
    assert limits == sorted(limits) and len(set(limits)) == len(limits)
    assert limits[0] < 0.75 * limits[2] < limits[1], "stacks are written in between"


def test_stacks_are_written_before_the_process_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANGS, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_CODE
    assert done.stdout.split("\n")[:2] == ["culprit (<string>:15)", "ends"]
    [file] = (tmp_path / HANGS).iterdir()
    text = file.read_text()
    assert "rank-0001: no progress: training step 7" in text and "in culprit" in text


def test_a_block_that_takes_too_long_leaves_its_stacks(tmp_path: Path) -> None:
    with stacks_after(60, tmp_path, "encoder", "one block"):
        pass
    assert _names(tmp_path) == []
    with stacks_after(0.1, tmp_path, "encoder", "one block"):
        while not _names(tmp_path / HANGS):
            time.sleep(0.01)
    assert _names(tmp_path / HANGS) == ["encoder"]


def test_a_rank_in_a_collective_call_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    here = threading.get_ident()

    def look(*_: object) -> bool:
        seen.append(waits_for_ranks(here))
        return False

    monkeypatch.setattr(distributed.dist, "is_initialized", look)
    distributed.barrier()
    look()
    assert seen == [True, False]
    assert place_of_thread(None) == "" and not waits_for_ranks(None)


def _slow(rank: int, waits: bool, step: int = 5) -> dict[str, object]:
    reason = f"rank {rank}, training step {step}: at f (x.py:{rank}) for 30 s"
    return {
        "event": "slow", "time": 1.0, "rank": rank, "step": step, "reason": reason,
        "waits_for_ranks": waits,
    }  # fmt: skip


def test_the_failure_of_a_rank_that_waited_names_the_one_it_waited_for() -> None:
    failed = {
        "event": "rank failed", "time": 2.0, "rank": 0, "reason": "RuntimeError: timed out",
        "bins": [], "ids": [], "step": 5,
    }  # fmt: skip
    error = RuntimeError("x")
    said = root_cause(error, [_slow(1, False), _slow(0, True), _slow(2, True), failed])
    assert said.startswith("rank 0: RuntimeError: timed out; ") and "at f (x.py:1)" in said
    assert "x.py:0" not in said and "x.py:2" not in said
    assert root_cause(error, [_slow(1, False, step=4), _slow(0, True), failed]).endswith("out")
    assert "x.py:1" in root_cause(error, [_slow(1, False)])
    assert root_cause(error, [failed]) == "rank 0: RuntimeError: timed out"


def test_stacks_need_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_stacks(tmp_path / "nowhere", "rank-0000", "training step 1")
