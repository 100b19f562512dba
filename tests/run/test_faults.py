"""Faults done to real runs, and what is left afterwards: `python -m tests.chaos` does many more."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from jobs import audit, train
from omni.checkpoint.checkpoint import read_checkpoint
from omni.metrics.run_files import read_events
from tests.helpers.whole_runs import ROOT, command, curve, ledger, lines, run_job


def _wait(
    until: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240
) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _step(run: Path) -> int:
    path = run / "metrics.jsonl"
    found = [row for row in lines(path) if row["kind"] == "train"] if path.exists() else []
    return int(found[-1]["step"]) if found else 0


def _events(run: Path) -> list[dict[str, object]]:
    return read_events(run)


def _same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def _started(config: Path, storage: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(config, storage, *overrides),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@pytest.mark.slow  # tests/run/test_run.py has a shorter one
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(
    tiny: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = _started(tiny, tmp_path)
    run = tmp_path / "run"
    _wait(lambda: _step(run) >= 10, process)
    process.send_signal(number)
    assert process.wait(60) == code
    stopped = _events(run)[-1]
    assert (stopped["event"], stopped["why"]) == ("stopped", number.name)
    assert stopped["step"] == _step(run) < 50
    assert (run / "checkpoints" / "last").resolve().name == f"step-{_step(run):06d}"
    assert "Not finished" in (run / "report.html").read_text()

    run_job(tiny, tmp_path)
    assert _same_weights(run, undisturbed)
    assert (curve(run), ledger(run)) == (curve(undisturbed), ledger(undisturbed))
    assert audit.main([str(run)]) == 0


@pytest.mark.slow
def test_workers_come_and_go_with_the_nodes(
    tiny: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 -> 1 -> 3 workers in one run: the plan goes on where it was, the curve too."""
    run = tmp_path / "run"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        doomed = cluster.add_node(num_cpus=1)
        overrides = ["--train.workers", "[1,3]", "--optim.steps", "150", "--data.cache", "null"]
        overrides += ["--train.checkpoint_every", "20", "--train.max_failures", "3"]
        overrides += ["--encoder.cpus", "0.25"]
        process = _started(tiny, tmp_path, *overrides, RAY_ADDRESS=cluster.address)
        _wait(lambda: _step(run) >= 25, process)
        cluster.remove_node(doomed, allow_graceful=False)
        _wait(lambda: [e["workers"] for e in _attempts(run)] == [2, 1], process)
        reached = _step(run)
        _wait(lambda: _step(run) >= reached + 10, process)
        cluster.add_node(num_cpus=2)
        _wait(lambda: [e["workers"] for e in _attempts(run)] == [2, 1, 3], process)
        assert process.wait(400) == 0
    finally:
        cluster.shutdown()
    assert audit.main([str(run)]) == 0
    assert "150 steps, 600 bins" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["workers"] == 3
    one, other = curve(undisturbed), curve(run)
    # The schedule is another with 150 steps; while it warms up it is the same.
    assert max(abs(one[step] - other[step]) for step in range(1, 6)) < 1e-4


def _attempts(run: Path) -> list[dict[str, object]]:
    return [event for event in _events(run) if event["event"] == "attempt"]


@pytest.mark.slow
def test_the_driver_verifies_the_weights_once_per_attempt_for_all_ranks(
    tiny: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "reads.log"
    shutil.copytree(undisturbed, run, symlinks=True)
    weights = run / "checkpoints" / "step-000050" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    overrides = ["--train.workers", "2", "--train.max_failures", "1", "--optim.steps", "64"]
    helpers = Path(__file__).parents[1] / "helpers" / "weight_reads"
    process = _started(
        tiny, tmp_path, *overrides, PYTHONPATH=f"{helpers}:{ROOT}", WEIGHT_READS=str(log)
    )
    _wait(lambda: (run / "checkpoints" / "step-000056" / "state.json").exists(), process, 400)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if "RayTrainWorker" in child.name()]
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(240) == 0
    first, second = [int(event["step"]) for event in _attempts(run)[1:]]  # type: ignore[call-overload]
    assert first == 49 < second
    reads = [line.split() for line in log.read_text().splitlines()]
    by_driver = [checkpoint for pid, checkpoint in reads if int(pid) == process.pid]
    assert by_driver == ["step-000050", f"step-{first:06d}", f"step-{second:06d}"]
    # At the end rank 0 verifies the best weights before it scores them.
    assert len(reads) == len(by_driver) + 1
    damaged = [event for event in _events(run) if event["event"] == "damaged checkpoint"]
    assert len(damaged) == 1 and "step-000050" in str(damaged[0]["reason"])
    assert audit.main([str(run)]) == 0


@pytest.mark.slow
def test_sharded_and_whole_training_continue_each_others_checkpoints(
    tiny: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """FSDP on two workers, DDP on one, FSDP on two: one curve."""
    run = tmp_path / "run"
    sharded = ["--train.workers", "2", "--train.strategy", "fsdp"]
    for overrides, until in ((sharded, 15), (["--train.workers", "1"], 30)):
        process = _started(tiny, tmp_path, *overrides)
        _wait(lambda until=until: _step(run) >= until, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    run_job(tiny, tmp_path, *sharded)
    assert [event["workers"] for event in _attempts(run)] == [2, 1, 2]
    one, other = curve(undisturbed), curve(run)
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-3
    expected, found = (json.loads((r / "summary.json").read_text()) for r in (undisturbed, run))
    assert abs(expected["dev_loss"] - found["dev_loss"]) < 1e-3
    whole, parts = (read_checkpoint(r / "checkpoints" / "last") for r in (undisturbed, run))
    assert any(".rank-0001." in name for name in parts.digests)
    assert whole.shapes() == parts.shapes()
    assert whole.optimizer().keys() == parts.optimizer().keys()
    assert audit.main([str(run)]) == 0


@pytest.mark.slow
def test_gradients_that_stay_nan_stop_the_run_and_name_the_bins(tiny: Path, tmp_path: Path) -> None:
    hopeless = ["--optim.lr", "1e30", "--optim.warmup_steps", "0", "--optim.max_skips", "2"]
    done = subprocess.run(
        command(tiny, tmp_path, *hopeless), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r"\b3 steps\b", last)
    run = tmp_path / "run"
    skipped = [event for event in _events(run) if event["event"] == "skipped"]
    assert len(skipped) == 3
    bins = skipped[-1]["bins"]
    assert isinstance(bins, list) and f": {', '.join(map(str, bins))}, utterances: " in last
    assert "asterisk-en/" in last
    assert "no update" in done.stdout
    assert not (run / "summary.json").exists()


@pytest.mark.slow
def test_steps_that_are_skipped_are_accounted_for(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit so low that usual gradients exceed it."""
    nervous = ["--optim.spike", "1.01", "--optim.max_skips", "1000", "--optim.steps", "300"]
    nervous += ["--optim.lr", "1e-2", "--optim.final_lr", "1"]  # norms that rise and fall
    run_job(tiny, tmp_path, *nervous, "--eval.every", "300", "--train.checkpoint_every", "50")
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["skipped_steps"] < 200, "100 updates come first"
    assert audit.main([str(run)]) == 0
    out = capsys.readouterr().out
    told = re.findall(r"^ +step \d+ .*\bgradient norm\b", out, re.M)
    assert len(told) == summary["skipped_steps"]
    assert "faults" in (run / "report.html").read_text()


@pytest.mark.slow
def test_another_corpus_goes_on_only_knowingly(
    tiny: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    other = ["--config", str(tiny), "--run.name", "run", "--run.storage", str(tmp_path)]
    other += ["--data.train", "embedded:train", "--optim.steps", "54"]
    assert train.main(other) == 2
    refusal = capsys.readouterr().err
    assert "data.train, plan" in refusal and "--run.override_fingerprint data.train" in refusal
    flags = ["--run.override_fingerprint", "data.train", "--run.override_fingerprint", "plan"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *other, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "data.train, plan" in done.stdout
    assert audit.main([str(tmp_path / "run")]) == 0
    assert "2 plans" in capsys.readouterr().out


def test_another_shape_is_refused_even_knowingly(
    tiny: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(tiny), "--run.name", "run", "--run.storage"]
    arguments += [str(undisturbed.parent), "--run.override_fingerprint", "model", "--optim.steps"]
    assert train.main([*arguments, "60", "--model.n_embd", "96"]) == 2
    refusal = capsys.readouterr().err
    assert re.search(r"run\.override_fingerprint model: ctc_head\.weight\b", refusal)


# -- the audit ---------------------------------------------------------------------------------


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    return run


def _rewrite(run: Path, change: Callable[[list[dict]], list[dict]]) -> None:  # type: ignore[type-arg]
    [path] = (run / "ledger").glob("rank-*.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in change(lines(path))))


def test_a_clean_run_is_proved_clean(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([str(copied)]) == 0
    out = capsys.readouterr().out
    assert "50 steps, 200 bins" in out and "1 attempt" in out and "1 attempts" not in out
    assert out.splitlines()[-1].startswith("clean: ")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda rows: rows[:7] + rows[8:], r"step 2: bins 7\b.*\bnot\b"),
        (lambda rows: [*rows[:8], rows[7], *rows[8:]], r"step 2: bins 7 (?!.*\bnot\b)"),
        (lambda rows: [{**rows[0], "bin": 11}, *rows[1:]], r"step 1: bins 0\b.*\bnot\b"),
        (
            lambda rows: [{**rows[0], "utterances": rows[0]["utterances"][1:]}, *rows[1:]],
            r"step 1: bin 0\b.*\brejected\b",
        ),
        (
            lambda rows: [{**rows[0], "utterances": [*rows[0]["utterances"], 3]}, *rows[1:]],
            r"step 1: bin 0\b.*\butterances 3\b",
        ),
        (lambda rows: [*rows[4:8], *rows[:4], *rows[8:]], r"step 1\b.*\bstep 2\b"),
        (lambda rows: [{"step": 1}, *rows], r"rank-0000\.lease-000001\.jsonl: \{'step': 1\}"),
        (lambda rows: rows[:-4], r"step 50: bins 196, 197, 198, 199\b.*\bnot\b"),
    ],
)
def test_whatever_is_wrong_is_named(
    copied: Path,
    change: Callable[[list[dict]], list[dict]],  # type: ignore[type-arg]
    finding: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _rewrite(copied, change)
    assert audit.main([str(copied)]) == 1
    said = capsys.readouterr()
    assert re.search(finding, said.out)
    assert said.err.splitlines()[-1].startswith("error: ")


def test_steps_without_an_update_are_told(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rewrite(copied, lambda rows: [{**rows[0], "skipped": "the loss is nan"}, *rows[1:]])
    assert audit.main([str(copied)]) == 0
    assert re.search(r"\bstep 1\b.*the loss is nan", capsys.readouterr().out)


def test_rows_of_a_process_that_lost_the_run_are_counted_and_ignored(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = copied / "events.rank-0000.jsonl"
    [attempt] = [row for row in lines(events) if row["event"] == "attempt"]
    taken = {**attempt, "lease": 2, "step": 40}
    events.write_text(events.read_text() + json.dumps(taken) + "\n")
    [ledger] = (copied / "ledger").glob("rank-*.jsonl")
    metrics = copied / "metrics.jsonl"
    late = [row for row in lines(ledger) if row["step"] > 40]
    second = ledger.with_name("rank-0000.lease-000002.jsonl")
    second.write_text("".join(json.dumps({**row, "lease": 2}) + "\n" for row in late))
    again = [{**row, "lease": 2} for row in lines(metrics) if row["step"] > 40]
    metrics.write_text(metrics.read_text() + "".join(json.dumps(row) + "\n" for row in again))
    assert audit.main([str(copied)]) == 0
    assert f"not counted: {len(late)} ledger rows" in capsys.readouterr().out
    events.write_text(events.read_text().replace('"lease": 2', '"lease": 1'))
    assert audit.main([str(copied)]) == 1, "without a takeover they are trained twice"


def test_a_run_of_an_older_version_is_audited(copied: Path) -> None:
    [ledger] = (copied / "ledger").glob("rank-*.jsonl")
    (copied / "events.rank-0000.jsonl").rename(copied / "events.jsonl")
    for path in (ledger, copied / "events.jsonl", copied / "metrics.jsonl"):
        rows = [{k: v for k, v in row.items() if k != "lease"} for row in lines(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger.rename(ledger.with_name("rank-0000.jsonl"))
    assert audit.main([str(copied)]) == 0


@pytest.mark.parametrize("missing", ["checkpoints", "events.rank-0000.jsonl", "plan"])
def test_a_run_without_its_books_is_an_error(
    copied: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = copied / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert audit.main([str(copied)]) == 1
    assert missing.partition(".")[0].rstrip("s") in capsys.readouterr().err


@pytest.mark.slow
def test_the_last_line_says_which_rank_failed_and_over_what(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "metrics.jsonl").mkdir(parents=True)  # the first log line cannot be written
    failed = subprocess.run(command(tiny, tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: rank 0: IsADirectoryError: ")
    assert re.search(r"\bstep 1\b.*\bbins 0, 1, 2, 3\b.*\butterances\b", last)
    [event] = [row for row in _events(run) if row["event"] == "rank failed"]
    assert (event["run"], event["rank"], event["step"]) == ("run", 0, 1)
    assert isinstance(event["ids"], list) and len(event["ids"]) > 4
    assert event["ids"][0] in last
