"""A job on a Ray cluster: sent there, followed, and ended, through the cluster's job server."""

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

from omni.cluster.versions import EXPECTED, PASSED_ON, expected_versions, installed_versions
from omni.cluster.working_dir import Packed, pack, readable
from omni.config import Config
from omni.errors import ConfigError, first_line
from omni.storage.path import redact

SETTINGS = "omni-job.yaml"  # the resolved settings, in the job's working directory
_PATIENCE = 60.0  # seconds without the job server before we stop following
_LONGEST_STEP = 60  # seconds on top of the grace period, for a checkpoint to reach storage


class SubmitError(RuntimeError):
    """The job server cannot be reached, or refuses."""


@dataclass(frozen=True)
class Request:
    """job: train or encode. python: the interpreter's name on the cluster's head. install: have
    the cluster install the versions that are installed here.
    """

    config: Config
    job: str
    folder: Path
    exclude: Sequence[str] = ()
    limit: int = 200 << 20
    python: str = "python"
    install: bool = False
    flags: Sequence[str] = ()  # of the job


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server at `address`; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or here.

    A cluster that asks for a token gets the one that is at hand. Raises SubmitError.
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
            f"{shown} asks for its token, and the one given is missing or another: put the "
            "cluster's into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None
    except (ConnectionError, requests.RequestException, RuntimeError) as error:
        raise SubmitError(f"no job server at {shown}: {first_line(error)}") from None


def submit(client: JobSubmissionClient, request: Request, say: Callable[[str], None]) -> str:
    """Pack the working directory and start the job; returns its id. Raises ConfigError where it
    is too large, SubmitError where the server refuses.
    """
    config = request.config
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # how it packs, file by file
    runtime: dict[str, Any] = {"env_vars": environment(config)}
    if request.install:
        wanted = [f"{name}=={version}" for name, version in installed_versions().items()]
        runtime["pip"] = {"packages": wanted, "pip_check": False}
    with tempfile.TemporaryDirectory(prefix="omni-submit-") as into:
        packed = pack(request.folder, Path(into), request.exclude, request.limit)
        describe(packed, say)
        say(f"run directory: {config.run_dir}, which every node of the cluster has to see")
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
            return str(_when_ready(start))
        except (RuntimeError, RayError) as error:
            raise SubmitError(f"the job was refused: {first_line(error)}") from None


def _when_ready(start: Callable[[], str]) -> str:
    """A head that has only just started takes no jobs yet."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return start()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def check_settings(config: Config) -> None:
    """Raises ConfigError where they hold secrets."""
    if "://***@" in config.to_yaml():
        raise ConfigError(
            "a URI with credentials would be readable by everyone on the cluster: set them in the "
            "environment of its nodes (AWS_ACCESS_KEY_ID and so on) and leave them out of the URI"
        )


def environment(config: Config) -> dict[str, str]:
    """What the job's processes are told: where weights come from, which versions were meant, and
    that a stopped job gets the time for its last checkpoint.
    """
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {name: text for name, text in given.items() if redact(text) == text} | {
        EXPECTED: expected_versions(),
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(config.run.grace_seconds) + _LONGEST_STEP),
    }


def describe(packed: Packed, say: Callable[[str], None]) -> None:
    say(f"working directory: {packed.files:,} files, {readable(packed.size)}")
    for item in packed.left_out[:8]:
        say(f"  without {item}")
    if len(packed.left_out) > 8:
        say(f"  and without {len(packed.left_out) - 8} smaller ones")


class Follower:
    """Writes a job's output as it comes, each character once, until the job has ended."""

    def __init__(
        self, client: JobSubmissionClient, job: str, write: Callable[[str], object]
    ) -> None:
        self._client, self._job, self._write = client, job, write
        self._written = 0  # characters
        self._heard = time.monotonic()

    def run(self) -> int:
        """The job's exit code. Raises SubmitError where the server stays away."""
        while True:
            try:
                asyncio.run(self._tail())
                details = self._client.get_job_info(self._job)
                if details.status.is_terminal():
                    self._rest()
                    return exit_code(details)
            except (RuntimeError, OSError, RayError) as error:
                if time.monotonic() - self._heard > _PATIENCE:
                    raise SubmitError(
                        f"{self._job}: the job server is gone: {first_line(error)}; the job itself "
                        "may go on"
                    ) from None
            time.sleep(1.0)

    async def _tail(self) -> None:
        """The server tells everything from the beginning, each time that it is asked."""
        seen = 0
        async for text in self._client.tail_job_logs(self._job):
            self._heard = time.monotonic()
            self._fresh(text, seen)
            seen += len(text)

    def _rest(self) -> None:
        """Lines that came between the last look and the end."""
        self._fresh(self._client.get_job_logs(self._job), 0)

    def _fresh(self, text: str, seen: int) -> None:
        fresh = text[max(0, self._written - seen) :]
        if fresh:
            self._write(fresh)
            self._written = max(self._written, seen + len(text))


def exit_code(details: JobDetails) -> int:
    """The driver's own; 130 for a job that was stopped, 1 for one that never ran."""
    if details.status == JobStatus.STOPPED:
        return 130
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    return 0 if details.status == JobStatus.SUCCEEDED else 1


def _token() -> str | None:
    """As Ray looks for it: in the environment, in a file that it names, in the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
