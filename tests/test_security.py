"""What must not happen: code from data, shells from settings, secrets on disk or on a dashboard."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import jobs
import jobs.audit
import jobs.compare
import jobs.evaluate
import jobs.index
import jobs.inspect
import jobs.transcribe
import omni
from jobs.cli import run_job
from omni.cluster.ray_init import runtime_environment
from omni.config import load_config, parse_config
from omni.errors import ConfigError
from omni.metrics.run_files import write_event
from omni.storage.path import as_path
from omni.storage.uri import public_uri, redact

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
    # Benchmarks start jobs of their own, git says what it ignores, voices speak, a driver tells of
    # its GPUs; none by a shell.
    programs = {
        *("omni/bench/whole_run.py", "omni/cluster/working_dir.py", "omni/recipes/voices.py"),
        "omni/cluster/gpu_health.py",
    }
    # Ray Data brings work to a worker, and results to the next stage, as the bytes that another
    # process of the same job pickled.
    own = {
        "omni/cluster/ray_tasks.py": {"pickle.loads(item)", "pickle.loads(pickled)"},
        "omni/inference/pipeline.py": {
            "pickle.loads(item['path'])",
            "pickle.loads(item['loaded'])",
        },
    }
    found = {
        place: call
        for place, call in found.items()
        if call not in own.get(place.partition(":")[0], ())
    }
    assert {place.partition(":")[0] for place in found} <= programs
    lists = ("subprocess.run([", "subprocess.run(command, ", "subprocess.Popen([")
    assert all(call.startswith(lists) for call in found.values()), found


def test_torch_files_are_loaded_as_weights_only() -> None:
    loads = [(place, call) for place, call in _calls() if ast.unparse(call.func) == "torch.load"]
    assert loads
    for place, call in loads:
        assert any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
            for keyword in call.keywords
        ), place


AWS = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYSECRETKEY"  # two slashes, as about half of the secrets have


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SECRET@bucket/cache?region=x", "s3://***@bucket/cache?region=x"),
        (f"s3://AKIA:{AWS}@bucket/cache", "s3://***@bucket/cache"),
        (f"wds:gs://KEY:{AWS}@bucket/{{1..2}}.tar", "wds:gs://***@bucket/{1..2}.tar"),
        (f"cannot open 's3://KEY:{AWS}@b/c': 403", "cannot open 's3://***@b/c': 403"),
        ("https://user:SECRET@hub.example/api", "https://***@hub.example/api"),
        ("https://user:SE/CR@ET@hub.example/api", "https://***@hub.example/api"),
        ("https://SECRET@hub.example/api", "https://***@hub.example/api"),
        ("hf://SECRET@datasets/a", "hf://***@datasets/a"),
        ("oss://KEY:SEC/RET@bucket/a", "oss://KEY:***@bucket/a"),
        ("abfs://box:SECRET@account/a?account_key=SECRET", "abfs://box:***@account/a?account_key=***"),
        ("https://b.test/a?X-Amz-Credential=SECRET&X-Amz-Signature=SECRET&X-Amz-Expires=9",
         "https://b.test/a?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Expires=9"),
        ("https://b.test/a?X-Amz-Security-Token=SECRET", "https://b.test/a?X-Amz-Security-Token=***"),
        ("https://x.blob.test/a?sv=1&sig=SECRET%3D&se=2", "https://x.blob.test/a?sv=1&sig=***&se=2"),
        ("https://b.test/a?AWSAccessKeyId=SECRET&Signature=SECRET&Expires=9",
         "https://b.test/a?AWSAccessKeyId=***&Signature=***&Expires=9"),
        ("https://b.test/a?X-Goog-Signature=SECRET", "https://b.test/a?X-Goog-Signature=***"),
        ("hub refuses hf_SECRETSECRETSECRET1", "hub refuses hf_***"),
        ("Authorization: Bearer SECRETSECRET", "Authorization: Bearer ***"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("http://127.0.0.1:8265/a@b", "http://127.0.0.1:8265/a@b"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("abfs://box@account.host/a", "abfs://box@account.host/a"),
        ("hdfs://me@namenode:8020/a@b", "hdfs://me@namenode:8020/a@b"),
        ("runs/me@home?signal=1", "runs/me@home?signal=1"),
    ],
)  # fmt: skip
def test_credentials_are_cut_out_of_texts(text: str, shown: str) -> None:
    assert redact(text) == shown == redact(shown)
    assert "SECRET" not in public_uri(text.partition("?")[0]) or "://" not in text


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://KEY:{AWS}@bucket/x",
        "s3://KEY:SECRET@bucket/x",
        f"s3://KEY:{AWS}",
        "gs://SECRET@bucket/x",
        "S3://KEY:SECRET@bucket/x",
        "s3://bucket/x?secret_key=SECRET&region=r",
    ],
)
def test_uris_of_buckets_hold_no_credentials(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever one is given, one line says where the credentials belong."""
    with pytest.raises(ConfigError) as caught:
        as_path(uri)
    said = [str(caught.value)]
    for name, value in (("data.train", f"wds:{uri}"), ("data.cache", uri), ("run.storage", uri)):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"--{name}", value])
        assert str(caught.value).startswith(f"{name}")
        said.append(str(caught.value))
    for job, *arguments in (
        (jobs.index, "--source", uri, "--out", "x"),
        (jobs.index, "--source", "x", "--out", uri),
        (jobs.evaluate, "--checkpoint", "x", "--data", f"parquet:{uri}"),
        (jobs.transcribe, "--checkpoint", uri, "x"),
        (jobs.inspect, uri),
        (jobs.audit, uri),
        (jobs.compare, uri),
    ):
        with pytest.raises(SystemExit) as ended:
            job.main(arguments)
        assert ended.value.code == 2
        said.append(capsys.readouterr().err)
    for line in said:
        assert "AWS_PROFILE" in line and line.strip().count("\n") == 0
        assert "SECRET" not in line.replace("AWS_SECRET_ACCESS_KEY", "") and "wJalr" not in line


def test_what_runs_of_before_wrote_can_be_read() -> None:
    """They wrote *** for credentials, and what follows the first slash of a secret."""
    assert str(as_path("s3://***@bucket/runs")) == "s3://bucket/runs"
    assert getattr(as_path("abfs://box:***@host/a?account_key=***"), "uri", "") == (
        "abfs://box@host/a"
    )
    assert getattr(as_path("gs://anonymous@bucket/a"), "uri", "") == "gs://anonymous@bucket/a"


def test_a_run_from_before_is_read_without_the_rest_of_its_secret(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{cache: 's3://KEY:{AWS}@bucket/cache'}}\n")
    with pytest.raises(ConfigError, match=r"^data\.cache: "):
        load_config(tmp_path / "config.yaml")
    found = load_config(tmp_path / "config.yaml", of_run=True)
    assert found.cache == "s3://***@bucket/cache" and AWS not in found.to_yaml()


def test_the_runs_own_configuration_holds_no_credentials() -> None:
    given = "oss://KEY:SEC/RET@bucket/cache"
    config = load_config(None, ["--data.cache", given, "--data.dev", "https://h/x?sig=SECRET"])
    assert config.cache == given and config.with_credentials == ["data.dev", "data.cache"]
    written = config.to_yaml()
    assert "SEC" not in written and "oss://KEY:***@bucket/cache" in written
    assert load_config(None, []).with_credentials == []


def test_events_hold_no_credentials(tmp_path: Path) -> None:
    write_event(tmp_path, "failed", reason=f"s3://K:{AWS}@b/x", ids=["https://u:SECRET@h/"])
    written = (tmp_path / "events.jsonl").read_text()
    assert "SECRET" not in written and "s3://***@b/x" in written


def test_errors_that_jobs_end_with_hold_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(kind: type[Exception]) -> None:
        raise kind(f"no answer of https://me:{AWS}@host/x?sig=SECRET")

    for kind, code in ((ConfigError, 2), (RuntimeError, 1)):
        assert run_job(partial(fail, kind)) == code
        said = capsys.readouterr().err
        assert said == "error: no answer of https://***@host/x?sig=***\n"


def test_ray_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:SECRET@hub.example")
    monkeypatch.setenv("HF_TOKEN", "SECRET")
    monkeypatch.setenv("WHISPER_HF_ID", "openai/whisper-small")
    variables = runtime_environment(parse_config({}))["env_vars"]
    assert variables["WHISPER_HF_ID"] == "openai/whisper-small"
    assert "SECRET" not in str(variables) and "HF_ENDPOINT" not in variables
