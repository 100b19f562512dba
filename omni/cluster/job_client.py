"""Submit a job to a Ray cluster's job server, follow its output, and return its exit code.

Ray's `tail_job_logs` ends with the connection and starts again at the first line; `Follower` goes
on where it was, so that each line is written once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from omni.cluster.versions import (
    EXPECTED,
    expected_versions,
    forwarded_variables,
    installed_versions,
)
from omni.cluster.working_dir import SECRET, Packed, pack, readable
from omni.config import Config
from omni.errors import ConfigError, ExitCode, counted, first_line
from omni.storage.uri import redact

SETTINGS = "omni-job.yaml"  # file of the resolved settings in the job's working directory
_SERVER_TIMEOUT = 60.0  # seconds
_MOST_NAMED = 8  # paths that are left out of the upload
_FINAL_SAVE_TIMEOUT = 60  # seconds after run.grace_seconds, for a checkpoint to reach storage


class SubmitError(RuntimeError):
    """The job server cannot be reached, or refuses the job."""


@dataclass(frozen=True)
class Request:
    """A job to run on a cluster.

    job: train or encode. folder: working directory to upload, at most `limit` bytes of it, without
    the patterns of `exclude`. python: interpreter on the cluster's head. install: have the cluster
    install the versions that are installed here. flags: further arguments of the job.
    """

    config: Config
    job: str
    folder: Path
    exclude: Sequence[str] = ()
    limit: int = 200 << 20
    python: str = "python"
    install: bool = False
    flags: Sequence[str] = ()


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to the job server at `address`.

    None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine. Sends the token of this machine if
    the cluster asks for one. Raises SubmitError.
    """
    import requests

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    address = address or "http://127.0.0.1:8265"
    if "://" not in address:
        raise ConfigError(f"--address: expected http://HOST:8265, got {address}")
    shown = redact(address)
    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            token = _token()
            if token is None:
                raise
            return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
    except AuthenticationError:
        raise SubmitError(
            f"{shown}: the cluster's token is missing here, or is another: put it into "
            "~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None
    except (ConnectionError, requests.RequestException, RuntimeError) as error:
        raise SubmitError(f"no job server at {shown}: {first_line(error)}") from None


def submit(client: JobSubmissionClient, request: Request, say: Callable[[str], None]) -> str:
    """Upload the working directory and start the job; returns its id.

    Raises ConfigError for a directory that is too large, SubmitError where the server refuses.
    """
    config = request.config
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # They log every file.
    runtime: dict[str, Any] = {"env_vars": environment(config)}
    if request.install:
        wanted = [f"{name}=={version}" for name, version in installed_versions().items()]
        runtime["pip"] = {"packages": wanted, "pip_check": False}
    with tempfile.TemporaryDirectory(prefix="omni-submit-") as into:
        packed = pack(request.folder, Path(into), request.exclude, request.limit)
        describe(packed, say)
        say(f"run directory: {config.run_dir}, which every node of the cluster must see")
        (packed.folder / SETTINGS).write_text(config.to_yaml())
        start = functools.partial(
            client.submit_job,
            entrypoint=" ".join(
                [request.python, "-m", f"jobs.{request.job}", "--config", SETTINGS, *request.flags]
            ),
            runtime_env={"working_dir": into, **runtime},
            metadata={"run": config.run.name, "submitted_from": platform.node()},
        )
        try:
            return str(_start_when_ready(start))
        except (RuntimeError, RayError) as error:
            raise SubmitError(f"the job was refused: {first_line(error)}") from None


def _start_when_ready(start: Callable[[], str]) -> str:
    """Retry while the head, which may have just started, takes no jobs yet."""
    deadline = time.monotonic() + _SERVER_TIMEOUT
    while True:
        try:
            return start()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def check_settings(config: Config) -> None:
    """Refuse URIs with credentials, which all on the cluster could read. Raises ConfigError."""
    if names := config.with_credentials:
        raise ConfigError(
            f"{', '.join(names)}: credentials would be readable by everyone on the cluster: set "
            "them in the environment of its nodes (AWS_ACCESS_KEY_ID and so on) and leave them out"
        )


def environment(config: Config) -> dict[str, str]:
    """Return the environment variables of the job.

    They are the sources of weights, the versions installed here, and the time in which a stopped
    job may write its last checkpoint.
    """
    return forwarded_variables() | {
        EXPECTED: expected_versions(),
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(config.run.grace_seconds) + _FINAL_SAVE_TIMEOUT),
    }


def describe(packed: Packed, say: Callable[[str], None]) -> None:
    say(f"working directory: {counted(packed.files, 'file')}, {readable(packed.size)}")
    secrets = [item for item in packed.left_out if item.reason == SECRET]
    if secrets:
        named = ", ".join(item.path for item in secrets[:_MOST_NAMED])
        more = f" and {len(secrets) - _MOST_NAMED} more" * (len(secrets) > _MOST_NAMED)
        say(f"  without {counted(len(secrets), 'path')} that {SECRET}: {named}{more}")
    others = packed.left_out[len(secrets) :]
    for item in others[:_MOST_NAMED]:
        say(f"  without {item}")
    if len(others) > _MOST_NAMED:
        say(f"  and without {len(others) - _MOST_NAMED} smaller ones")


class Follower:
    """Write a job's output as it comes, each character once, until the job has ended."""

    def __init__(
        self, client: JobSubmissionClient, job: str, write: Callable[[str], object]
    ) -> None:
        self._client, self._job, self._write = client, job, write
        self._written = 0
        self._last_answer = time.monotonic()

    def run(self) -> int:
        """Follow the job and return its exit code. Raises SubmitError if the server is gone."""
        while True:
            try:
                asyncio.run(self._tail())
                details = self._client.get_job_info(self._job)
                if details.status.is_terminal():
                    self._write_new(self._client.get_job_logs(self._job), 0)
                    return exit_code(details)
            except (RuntimeError, OSError, RayError) as error:
                if time.monotonic() - self._last_answer > _SERVER_TIMEOUT:
                    raise SubmitError(
                        f"{self._job}: no answer from the job server for {_SERVER_TIMEOUT:.0f} s: "
                        f"{first_line(error)}; the job itself may continue"
                    ) from None
            time.sleep(1.0)

    async def _tail(self) -> None:
        """Follow one connection; the server sends everything from the beginning on each."""
        seen = 0
        async for text in self._client.tail_job_logs(self._job):
            self._last_answer = time.monotonic()
            self._write_new(text, seen)
            seen += len(text)

    def _write_new(self, text: str, seen: int) -> None:
        new = text[max(0, self._written - seen) :]
        if new:
            self._write(new)
            self._written = max(self._written, seen + len(text))


def exit_code(details: JobDetails) -> int:
    """Return the driver's exit code; 130 for a job that was stopped, 1 for one that never ran."""
    if details.status == JobStatus.STOPPED:
        return ExitCode.INTERRUPTED
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    return ExitCode.DONE if details.status == JobStatus.SUCCEEDED else ExitCode.FAILED


def _token() -> str | None:
    """Read the token where Ray does: environment, the file that it names, or the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
