"""Ray clusters of separate processes on this machine, as `ray start` makes them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class RunningCluster:
    """address: of the job server, which asks for the token. folder: what Ray keeps (--temp-dir).
    nodes: the id of the node of each pool.
    """

    address: str
    token: str
    folder: Path
    nodes: dict[str, str]

    def state(self, kind: str) -> list[dict[str, Any]]:
        """What Ray's state API knows of `kind`: nodes, actors."""
        answer = requests.get(
            f"{self.address}/api/v0/{kind}?detail=1&limit=1000",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=30,
        )
        answer.raise_for_status()
        rows: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
        return rows

    def user(self) -> dict[str, str]:
        """The environment of someone who has omni and the token."""
        return {**os.environ, "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def running_cluster(cpus: int, pools: Sequence[str] = ()) -> Iterator[RunningCluster]:
    """A head with `cpus` logical CPUs; or one without any, and for each pool a node of its own with
    as many and the label pool=NAME. All of it is gone afterwards.
    """
    token, folder = secrets.token_hex(32), Path(tempfile.mkdtemp(prefix="omni-ray-", dir="/tmp"))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_metrics_report_interval_ms": "1000",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for name in ("RAY_ADDRESS", "PYTHONPATH"):  # jobs run the code that they bring along
        environment.pop(name, None)
    port, dashboard = free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    head = [
        *("--num-cpus", "0" if pools else str(cpus)),
        *("--head", "--port", str(port), "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(free_port()), "--temp-dir", str(folder)),
    ]
    # One log monitor is enough for nodes that share a folder.
    join = [
        *("--num-cpus", str(cpus), "--address", f"127.0.0.1:{port}"),
        *("--include-log-monitor", "false"),
    ]
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> None:
        common = [
            *("ray", "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--num-gpus", "0"),
            *("--dashboard-agent-listen-port", str(free_port())),
            *("--metrics-export-port", str(free_port())),
        ]
        with (folder / "start.log").open("ab") as log:
            process = subprocess.Popen(
                [*common, *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)

    def everyone_runs() -> None:
        if any(process.poll() is not None for process in started):
            raise AssertionError(f"a node ended at once:\n{(folder / 'start.log').read_text()}")

    try:
        start(*head)
        wait_until(lambda: listens(dashboard), "a head", everyone_runs)
        cluster = RunningCluster(address, token, folder, {})
        for count, pool in enumerate(pools, 1):  # not at once: they would choose the same ports
            start(*join, "--labels", f"pool={pool}")
            wait_until(lambda count=count: _joined(cluster, count), "node", everyone_runs)
        yield cluster
    finally:
        end_families(started)
        shutil.rmtree(folder, ignore_errors=True)


def _joined(cluster: RunningCluster, count: int) -> bool:
    with contextlib.suppress(requests.RequestException, KeyError, TypeError):
        for node in cluster.state("nodes"):
            if node["state"] == "ALIVE" and "pool" in (node.get("labels") or {}):
                cluster.nodes[node["labels"]["pool"]] = node["node_id"]
    return len(cluster.nodes) == count


def end_families(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """End processes and all that they started: politely, then not."""
    families = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            families += [psutil.Process(process.pid)]
            families += families[-1].children(recursive=True)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(families, timeout=10)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=10)


def wait_until(
    done: Callable[[], bool], what: str, check: Callable[[], None] = lambda: None
) -> None:
    """Asserts that `done` comes true in time; `check` raises where it never will."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        check()
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.5)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
