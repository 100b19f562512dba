"""jobs.submit against a real cluster of its own, which asks for a token."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import submit
from omni.cluster.versions import installed_versions
from tests.helpers.clusters import ROOT, running_cluster

SETTINGS = """
run: {name: sent, storage: %s}
data: {train: [embedded:train], dev: [embedded:dev], loaders: 1, cache: %s}
encoder: {weights: embedded, cpus: 0.5}
tokenizer: {vocab_size: 320}
model: {n_layer: 2, n_embd: 64, n_head: 2, stack: 8}
optim: {bin_positions: 512, bins_per_step: 1, steps: %d}
train: {checkpoint_every: 1000, log_every: 5, cpus: 0.5}
eval: {every: 1000, max_utterances: 4, wer_utterances: 2}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    """(the job server's address, the token) of a head that runs until the tests are done."""
    with running_cluster(cpus=6) as running:
        yield running.address, running.token


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own, with nothing but settings."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "c.yaml").write_text(SETTINGS % (tmp_path / "runs", tmp_path / "cache", 10))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_a_run_from_another_directory(
    cluster: tuple[str, str],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, token = cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    (project / "c.env").write_text("A=1")
    (project / ".env").write_text("SECRET=1")
    assert submit.main(["--config", "c.yaml", "--address", address, "--optim.steps", "15"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"(?<!\S)\.env \(8 B, .*\bsecrets\b", out)
    assert re.search(r"\b\d+ files, \d+(\.\d)? MB\b", out)
    for step in (5, 10, 15):
        assert len(re.findall(rf"^ +{step}/15 loss ", out, re.M)) == 1, out
    for name, version in installed_versions().items():
        assert f"{name} is {version}" not in out, "no version differs from the one there"
    summary = json.loads((tmp_path / "runs/sent/summary.json").read_text())
    assert summary["steps"] == 15


@pytest.mark.slow
def test_the_exit_code_is_the_jobs_own(
    cluster: tuple[str, str],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, token = cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("OMNI_EXPECTED_VERSIONS", "{}")
    code = submit.main(
        ["--config", "c.yaml", "--address", address, "--data.train", "/nowhere/train.jsonl"]
    )
    assert code == 2
    assert "error: data: /nowhere/train.jsonl: " in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_asks_and_a_stopped_job_leaves_a_checkpoint(
    cluster: tuple[str, str], project: Path, tmp_path: Path
) -> None:
    address, token = cluster
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.submit", "--config", "c.yaml", "--address", address),
            *("--optim.steps", "5000", "--train.log_every", "1", "--python", sys.executable),
        ],
        env={**os.environ, "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT)},
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if re.match(r" +3/5000 ", line):
            break
    process.send_signal(signal.SIGINT)
    os.write(keyboard, b"y\n")
    read += process.stdout.read()
    assert process.wait(180) == 130, read
    assert re.search(r"\bSIG(INT|TERM)\b.*\bcheckpoint\b.*\bstep \d+", read)
    assert (tmp_path / "runs/sent/checkpoints/last/state.json").is_file()


@pytest.mark.slow
def test_a_wrong_token_and_an_address_where_nobody_is(
    cluster: tuple[str, str],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    assert submit.main(["--config", "c.yaml", "--address", cluster[0]]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "RAY_AUTH_TOKEN" in error
    assert submit.main(["--config", "c.yaml", "--address", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "http://127.0.0.1:9" in error


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("--data.cache", "s3://key:secret@bucket/x"), "AWS_ACCESS_KEY_ID"),
        (("--optim.steps", "none"), "error: optim.steps: "),
        (("--working_dir", "/nowhere"), "error: --working_dir: /nowhere"),
        (("--job", "encode", "--dry_run"), "error: --dry_run: "),
    ],
)
def test_what_could_not_work_there_is_refused_before_anyone_is_asked(
    project: Path, settings: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9"
    assert submit.main(["--config", "c.yaml", "--address", nobody, *settings]) == 2
    error = capsys.readouterr().err
    assert named in error and "key:" not in error and "secret" not in error
