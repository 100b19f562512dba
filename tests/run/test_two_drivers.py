"""Two drivers on one run: one trains, and one that was away finds out and writes nothing more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs import audit
from omni.errors import ExitCode
from omni.metrics.run_files import read_events
from omni.storage.digest import file_digest
from tests.helpers.whole_runs import ROOT, command, curve

_TRIES = 3  # Ray gives its own processes 30 s to start, which busy machines may not have.
FAST = ("--run.lease_seconds", "8")


def _start(config: Path, storage: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, storage, *FAST),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait(until: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _contents(run: Path) -> set[tuple[str, str]]:
    """Checksums of files of a run and targets of its links, without Ray's and TensorBoard's."""
    found = set()
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if name.startswith((".ray/", "tensorboard/")):
            continue
        if path.is_symlink():
            found.add((name, str(path.readlink())))
        elif path.is_file():
            found.add((name, file_digest(path, size=16)))
    return found


def _errors_of(process: psutil.Process) -> str:
    """Text that a worker process of Ray wrote to stderr."""
    ray = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    logs = ray.glob(f"session_*/logs/worker-*-{process.pid}.err")
    return max(logs, key=lambda path: path.stat().st_mtime).read_text()


def _checkpoint_after(run: Path, step: int) -> bool:
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    return any(int(name.removeprefix("step-")) >= step for name in names)


@pytest.mark.slow
def test_a_driver_that_was_away_finds_its_run_taken_over_and_publishes_nothing(
    tiny: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = _start(tiny, tmp_path)
    others: list[subprocess.Popen[str]] = []
    tree: list[psutil.Process] = []
    try:
        _wait((run / "lease.json").is_file, first)
        others.append(refused := _start(tiny, tmp_path))
        _wait(lambda: refused.poll() is not None, first)
        said, _ = refused.communicate()
        assert refused.returncode == ExitCode.RUN_TAKEN, said
        assert f"pid {first.pid}" in said.splitlines()[-1], said
        _wait(lambda: _checkpoint_after(run, 7), first)
        tree = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        said = ""
        for _ in range(_TRIES):
            others.append(second := _start(tiny, tmp_path))
            text = second.communicate(timeout=900)[0]
            said += text
            if "timed out during startup" not in text:
                break
        assert second.returncode == 0, said
        assert f"pid {first.pid}" in said and "taking over" in said
        after_second = _contents(run)
        assert (run / "summary.json").is_file()
        ranks = [process for process in tree if "RayTrainWorker" in process.name()]
        assert len(ranks) == 1
        # Driver and cluster stay stopped, so that nobody but itself ends the rank.
        ranks[0].resume()
        gone, _ = psutil.wait_procs(ranks, timeout=120)
        assert gone == ranks, "a rank whose run was taken over goes on"
        assert f"pid {second.pid} has taken over" in _errors_of(ranks[0])
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        said, _ = first.communicate(timeout=300)
        assert first.returncode == ExitCode.RUN_TAKEN, said
        assert f"pid {second.pid}" in said.splitlines()[-1], said
        time.sleep(3)
        assert _contents(run) == after_second
    finally:
        for process in reversed(tree):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for driver in (first, *others):
            if driver.poll() is None:
                driver.send_signal(signal.SIGINT if driver in others else signal.SIGKILL)
                driver.wait(60)
    assert audit.main([str(run)]) == 0
    assert "clean" in capsys.readouterr().out
    assert curve(run) == curve(undisturbed)
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints") / "last" / name
        assert (run / last).read_bytes() == (undisturbed / last).read_bytes()
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    attempts = [row["lease"] for row in read_events(run) if row["event"] == "attempt"]
    assert len(attempts) == 2 and attempts[0] == 1 and state["lease"] == attempts[1]
    [takeover] = [row for row in read_events(run) if row["event"] == "takeover"]
    assert takeover["owner"]["pid"] == first.pid
