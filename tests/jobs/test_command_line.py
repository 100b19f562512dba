"""The command `omni`: its jobs, their help and exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from jobs import encode, train
from jobs.__main__ import JOBS, main
from jobs.cli import parse_settings, settings_parser
from jobs.decoding_arguments import checkpoint_path
from omni.config import load_config, shipped_configs
from omni.config.reference import sections, settings_of

ROOT = Path(__file__).parents[2]
ALL_JOBS = [name for names in JOBS.values() for name in names]


def test_the_first_screen_has_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("  ")]
    assert set(ALL_JOBS) <= set(listed)
    modules = {path.stem for path in (Path(__file__).parents[2] / "jobs").glob("*.py")}
    shared = {"cli", "corpus_arguments", "decoding_arguments"}
    assert modules == {*ALL_JOBS, *shared, "__init__", "__main__"}
    assert max(map(len, shown.splitlines())) <= 100


def test_the_installed_command_is_this_one() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    script = re.search(r'^omni = "([a-z_.]+):([a-z_]+)"$', project, re.M)
    assert script is not None
    assert getattr(import_module(script[1]), script[2]) is main


@pytest.mark.parametrize("job", ALL_JOBS)
def test_every_job_has_help(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([job, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: omni {job} ")


@pytest.mark.parametrize("section", sections())
def test_help_lists_the_settings_of_a_section(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help", section])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for setting in settings_of(sections()[section]):
        assert f"--{section}.{setting.name} " in shown and setting.sentence in shown
        assert f"default {setting.default})" in shown


def test_help_of_all_sections_and_of_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help", "all"])
    shown = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{shown}" for name in sections())
    with pytest.raises(SystemExit) as ended:
        train.main(["--help", "optimizer"])
    assert ended.value.code == 2
    assert re.search(r"\boptim\b", capsys.readouterr().err)


def test_a_job_lists_the_sections_that_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        encode.main(["--help"])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert [name for name in shown if name in sections()] == ["run", "data", "augment", "encoder"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--optim.warmup", "3"], "did you mean warmup_steps?"),
        (["train", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["train"], "--config"),
        (["train", "--optim.steps", "3"], "smoke"),
        (["train", "--config", "smoek"], "did you mean smoke?"),
        (["train", "--config", "smoke", "--dry-rum"], "did you mean --dry_run?"),
        (["train", "--config", "smoke", "--model.n-embd", "50", "--model.n-head", "2"], "n_embd"),
        (["encode", "--data.loaders", "0"], "data.loaders"),
        (["submit", "--config", "smoke", "--working_dir", "/nowhere"], "--working_dir"),
        (["index", "--source", "x", "--out", "y", "--rows_per_part", "0"], "--rows_per_part"),
        (["index", "--source", "x", "--out", "y", "--silence_seconds", "1"], "--silence_seconds"),
    ],
)
def test_wrong_arguments_are_named(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_configs_that_come_with_omni_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"smoke", "dialogue", "gpu1"} <= shipped_configs().keys()
    smoke = load_config("smoke")
    assert smoke == load_config(shipped_configs()["smoke"])
    Path("smoke").write_text("optim: {steps: 3}")
    assert load_config("smoke").optim.steps == 3, "a file of one's own comes first"


def test_dashes_and_underscores_are_the_same_in_names() -> None:
    parser = settings_parser("train", "Train.")
    parser.add_argument("--dry_run", action="store_true")
    argv = ["--config", "smoke", "--dry-run", "--run.name=a-b", "--data.prompt", "x-y"]
    arguments, config = parse_settings(parser, argv)
    assert arguments.dry_run and (config.run.name, config.data.prompt) == ("a-b", "x-y")


def test_an_unknown_argument_of_any_job_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", "--checkpoint", "x", "y.wav", "--devise", "cpu"])
    assert ended.value.code == 2
    assert "did you mean --device?" in capsys.readouterr().err


def test_a_run_directory_names_its_best_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_path(str(tmp_path)) == tmp_path
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    assert checkpoint_path(str(tmp_path)) == tmp_path / "checkpoints" / "best"


@pytest.mark.parametrize("job", ["audit", "evaluate", "export", "transcribe", "index"])
def test_missing_arguments_are_named(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([job])
    assert ended.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err


def test_an_audit_of_nothing_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}") and error.count("\n") == 1


def _failing_job(**variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a job that fails with a message in Japanese."""
    code = (
        "from jobs.cli import run_job\nfrom omni.errors import ConfigError\n"
        "def fail(): raise ConfigError('\\u65e5\\u672c')\nraise SystemExit(run_job(fail))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)


def test_a_terminal_that_lacks_characters_gets_escapes() -> None:
    done = _failing_job(PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (2, rb"error: \u65e5\u672c" + b"\n")


def test_a_locale_in_which_names_of_files_do_not_exist_is_named() -> None:
    done = _failing_job(LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and b"PYTHONUTF8=1" in done.stderr


def test_output_that_nobody_reads_any_more_ends_quietly() -> None:
    script = (
        "import sys; from jobs.cli import run_job; sys.exit(run_job(lambda: print('x' * 99999)))"
    )
    command = f'{sys.executable} -c "{script}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ""
