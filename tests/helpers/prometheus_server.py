"""A real Prometheus on this machine, and promtool: Debian's, which `make prometheus` unpacks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.helpers.clusters import ROOT, RunningCluster, end_families, free_port, wait_until

ALERTS = ROOT / "configs/grafana/alerts.yaml"
SCRAPE_SECONDS = 2


def binary(name: str) -> str:
    """The path of prometheus or promtool: on PATH, in this checkout's environment, or in the one
    that runs the tests.
    """
    unpacked = [Path(home) / "prometheus/usr/bin" for home in (ROOT / ".venv", sys.prefix)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, unpacked)])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(
            f"no {name} on PATH: `make prometheus` unpacks Debian's into .venv/prometheus; "
            "elsewhere install Prometheus by hand"
        )
    return found


@dataclass(frozen=True)
class Prometheus:
    address: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of /api/v1. A query that is wrong fails the test."""
        answer = requests.get(f"{self.address}/api/v1/{path}", params=parameters, timeout=30)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def over(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """The series of a query, evaluated every two seconds from `start` to `end`."""
        data = self.ask("query_range", query=expression, start=start, end=end, step=SCRAPE_SECONDS)
        series: list[dict[str, Any]] = data["result"]
        return series

    def targets_up(self) -> int:
        return sum(t["health"] == "up" for t in self.ask("targets")["activeTargets"])


@contextlib.contextmanager
def running_prometheus(cluster: RunningCluster, folder: Path) -> Iterator[Prometheus]:
    """Scrapes the cluster by the configuration that its head wrote, but more often, and evaluates
    the alert rules.
    """
    written = cluster.folder / "session_latest/metrics/prometheus/prometheus.yml"
    wait_until(written.is_file, "prometheus.yml of the head")
    config = yaml.safe_load(written.read_text())
    every = f"{SCRAPE_SECONDS}s"
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    config["rule_files"] = [str(ALERTS)]
    # Prometheus looks at a file that changed at once, at one that was not there after this time.
    for job in config["scrape_configs"]:
        for found in job["file_sd_configs"]:
            found["refresh_interval"] = every
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(binary("prometheus"), "--config.file", str(path)),
                *("--storage.tsdb.path", str(folder / "data")),
                *("--web.listen-address", f"127.0.0.1:{port}"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")

    def check() -> None:
        assert process.poll() is None, (folder / "prometheus.log").read_text()[-2000:]

    def scrapes() -> bool:
        with contextlib.suppress(requests.RequestException):
            return prometheus.targets_up() >= 1 + len(cluster.nodes)
        return False

    try:
        wait_until(scrapes, "Prometheus that scrapes every node", check)
        yield prometheus
    finally:
        end_families([process])
