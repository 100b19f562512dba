"""Addresses and folders that no cluster can use: one line, soon, that names the setting."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from omni.cluster import ray_init
from omni.cluster.ray_init import runtime_environment, start_ray
from omni.cluster.ray_internals.core import longest_socket_name
from omni.config import Config, parse_config
from omni.errors import ConfigError

ROOT = Path(ray_init.__file__).parents[2]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No cluster in this process, and little patience."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_init, "_ADDRESS_SECONDS", 0.5)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return monkeypatch


@pytest.fixture
def silent() -> Iterator[int]:
    """A port at which something answers that is no cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no-such-host.invalid:{}"])
@pytest.mark.parametrize("answers", [False, True])
def test_a_cluster_that_is_gone(
    form: str, answers: bool, away: pytest.MonkeyPatch, silent: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    address = form.format(silent if answers else free)
    away.setenv("RAY_ADDRESS", address)
    with pytest.raises(RuntimeError, match=f"^RAY_ADDRESS: .*{address}"):
        start_ray(Config())


@pytest.mark.parametrize("address", ["head", "http://10.0.0.1:8265", "10.0.0.1:", ":6379"])
def test_what_is_no_address(address: str, away: pytest.MonkeyPatch) -> None:
    away.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS: expected HOST:PORT.*{address}"):
        start_ray(Config())


@pytest.mark.parametrize("setting", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_with_a_long_name(setting: str, away: pytest.MonkeyPatch) -> None:
    away.delenv("RAY_ADDRESS", raising=False)
    away.setenv(setting, "/" + 100 * "x")
    with pytest.raises(ConfigError, match=f"^{setting}: /x"):
        start_ray(Config())


@pytest.mark.ray
def test_the_longest_folder_that_is_accepted_works() -> None:
    """At the limit, Ray itself agrees with the check."""
    rest = 107 - len(longest_socket_name().replace("/tmp/ray", "/ray")) - 2  # a longer pid
    folder = Path("/tmp") / ("t" * (rest - len("/tmp/")))
    folder.mkdir(exist_ok=True)
    script = (
        "from omni.cluster.ray_init import start_ray; from omni.config import Config\n"
        "start_ray(Config()); import ray; print(ray.cluster_resources()['CPU'] > 0)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
        env={**environment, "TMPDIR": str(folder)},
    )  # fmt: skip
    shutil.rmtree(folder)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
def test_the_job_ends_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.index", "--source", "embedded:dev", "--out", str(tmp_path),
         "--rows_per_part", "10"],  # Few parts are made without Ray.
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{free}"},
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: RAY_ADDRESS: no cluster answers at 127.0.0.1:{free}")


def test_a_machine_that_is_too_busy_for_ray_is_one_line(away: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    away.delenv("RAY_ADDRESS", raising=False)
    away.setattr(ray, "init", late)
    with pytest.raises(RuntimeError, match="too busy"):
        start_ray(Config())


def test_collective_calls_of_gpus_are_recorded_into_the_run(tmp_path: Path) -> None:
    run = {"storage": str(tmp_path), "name": "run"}
    variables = runtime_environment(parse_config({"run": run, "train": {"gpus": 1}}))["env_vars"]
    assert variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "run" / "hangs" / "nccl-")
    names = runtime_environment(parse_config({"run": run}))["env_vars"]
    assert not [name for name in names if name.startswith("TORCH")], "gloo has no recorder"
