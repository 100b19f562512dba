"""What must not happen: code from data, shells from settings, secrets on disk or on a dashboard."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jobs
import omni
from omni.cluster.ray_init import runtime_environment
from omni.config import load_config
from omni.storage.uri import redact

PACKAGES = [Path(module.__file__ or "").parent for module in (omni, jobs)]
RUNS_CODE = {
    *("eval", "exec", "os.system", "os.popen", "os.execv", "os.spawnl", "pty.spawn"),
    *("pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "joblib.load"),
    *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "cloudpickle.loads"),
}


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(package.parent)}:{node.lineno}", node


def test_nothing_runs_a_shell_or_unpickles() -> None:
    found = {
        place: ast.unparse(call)
        for place, call in _calls()
        if ast.unparse(call.func) in RUNS_CODE or any(k.arg == "shell" for k in call.keywords)
    }
    # The benchmark starts jobs of its own, and git says what it ignores; neither by a shell.
    programs = {"omni/bench/whole_run.py", "omni/cluster/working_dir.py"}
    assert {place.partition(":")[0] for place in found} <= programs
    assert all(call.startswith("subprocess.run([") for call in found.values()), found


def test_torch_files_are_loaded_as_weights_only() -> None:
    loads = [(place, call) for place, call in _calls() if ast.unparse(call.func) == "torch.load"]
    assert loads
    for place, call in loads:
        assert any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
            for keyword in call.keywords
        ), place


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SECRET@bucket/cache?region=x", "s3://***@bucket/cache?region=x"),
        ("https://user:SECRET@hub.example/api", "https://***@hub.example/api"),
        ("cannot open 's3://KEY:SECRET@b/c': 403", "cannot open 's3://***@b/c': 403"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("runs/me@home", "runs/me@home"),
    ],
)
def test_credentials_are_cut_out_of_uris(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_the_runs_own_configuration_holds_no_credentials() -> None:
    config = load_config(None, ["--data.cache", "s3://KEY:SECRET@bucket/cache"])
    assert config.cache == "s3://KEY:SECRET@bucket/cache"
    assert "SECRET" not in config.to_yaml() and "s3://***@bucket/cache" in config.to_yaml()


def test_ray_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:SECRET@hub.example")
    monkeypatch.setenv("HF_TOKEN", "SECRET")
    monkeypatch.setenv("WHISPER_HF_ID", "openai/whisper-small")
    variables = runtime_environment()["env_vars"]
    assert variables["WHISPER_HF_ID"] == "openai/whisper-small"
    assert "SECRET" not in str(variables) and "HF_ENDPOINT" not in variables
