"""A run of several windows, killed in the third and continued, is the undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from jobs import audit
from omni.plan.windows_file import read_window_bins
from tests.helpers.whole_runs import ROOT, command, curve, ledger, lines, run_job

BINS, STEPS = 2, 40  # bins of a step, and steps: a window has three or four bins
SETTINGS = ["--data.window_utterances", "16", "--optim.steps", f"{STEPS}", "--eval.every", "20"]
SETTINGS += ["--optim.bins_per_step", f"{BINS}"]


@pytest.mark.slow  # Three starts of a run.
def test_killed_in_its_third_window_and_continued(tiny: Path, tmp_path: Path) -> None:
    run_job(tiny, tmp_path / "whole", *SETTINGS)
    whole = tmp_path / "whole" / "run"
    [plan] = [path.stem for path in (whole / "plan").glob("*.json")]
    bins = read_window_bins(whole, plan)
    assert sum(bins) >= BINS * STEPS and len(bins) >= 7
    assert audit.main([str(whole)]) == 0

    storage = tmp_path / "killed"
    process = subprocess.Popen(
        command(tiny, storage, *SETTINGS, "--train.checkpoint_every", "1"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = storage / "run"
    step = sum(bins[:2]) // BINS + 1
    assert sum(bins[:2]) < step * BINS < sum(bins[:3]), "in the middle of the third window"
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / f"step-{step:06d}" / "state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:  # Ray starts its processes in sessions of their own.
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(30)
    (run / "summary.json").unlink(missing_ok=True)
    # Of the counts of its windows only the first is left: the others are planned again.
    counts = run / "plan" / f"{plan}.windows.jsonl"
    counts.write_text(counts.read_text().splitlines(keepends=True)[0])

    run_job(tiny, storage, *SETTINGS, "--train.checkpoint_every", "1")
    [first, second] = [row for row in lines_of_events(run) if row["event"] == "attempt"]
    assert first["step"] == 0 and int(str(second["step"])) >= step
    assert (curve(run), ledger(run)) == (curve(whole), ledger(whole))
    one, other = (load_file(r / "checkpoints" / "last" / "model.safetensors") for r in (run, whole))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert read_window_bins(run, plan)[: len(bins)] == bins
    assert audit.main([str(run)]) == 0
    _check_that_the_audit_can_fail(run, tmp_path / "damaged", plan)


def lines_of_events(run: Path) -> list[dict[str, object]]:
    return [row for path in sorted(run.glob("events*.jsonl")) for row in lines(path)]


def _check_that_the_audit_can_fail(run: Path, damaged: Path, plan: str) -> None:
    shutil.copytree(run, damaged, symlinks=True)
    [*_, path] = sorted((damaged / "ledger").glob("rank-*.jsonl"))
    rows = lines(path)
    rows[-1]["utterances"] = rows[-1]["utterances"][1:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert audit.main([str(damaged)]) == 1
    shutil.rmtree(damaged)
    shutil.copytree(run, damaged, symlinks=True)
    counts = damaged / "plan" / f"{plan}.windows.jsonl"
    counts.write_text(json.dumps({"window": 0, "bins": 1}) + "\n")
    assert audit.main([str(damaged)]) == 1
