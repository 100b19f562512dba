"""A run that is sent to a cluster of two pools, and what is to be seen of it from outside."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from ray.job_submission import JobStatus

from omni.checkpoint.checkpoint import read_checkpoint
from omni.cluster.job_client import connect
from omni.metrics.run_files import read_events
from tests.helpers.clusters import ROOT, RunningCluster, running_cluster
from tests.helpers.prometheus_server import ALERTS, Prometheus, running_prometheus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS, LOG_EVERY = 60, 5
DASHBOARD = ROOT / "configs/grafana/omni.json"
# Panels without data in the run of these tests, each with the reason.
EMPTY = {"GPU memory": "the cluster has no GPU", "MFU": "nor a peak that is known"}
# Lines that come from Ray and say nothing that a user could act on.
NOISE = (
    r"Traceback|\bWARNING\b|\bERROR\b|\b[EW] \d+ \d+\]|\(autoscaler|\(raylet|\(\w+ pid=|"
    r"More than \d+|\w+\.(py|cc):\d+"
)


@dataclass(frozen=True)
class Sent:
    """A run that has ended: its directory, what `jobs.submit` printed, and from when to when."""

    folder: Path
    output: str
    began: float
    ended: float


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster(cpus=4, pools=("encoder", "trainer")) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    with running_prometheus(cluster, tmp_path_factory.mktemp("prometheus")) as running:
        yield running


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def sent(cluster: RunningCluster, prometheus: Prometheus, storage: Path) -> Sent:
    """The main job, sent from another directory; one of its recordings cannot be used."""
    broken = _unusable_recording(storage / "broken")
    began = time.time()
    done = subprocess.run(
        [
            *_command(cluster, storage, "sent"),
            *("--data.train", "embedded:train", "--data.train", str(broken), "--data.test", "[]"),
            *("--optim.steps", str(STEPS), "--train.log_every", str(LOG_EVERY)),
            *("--eval.every", "30", "--eval.max_utterances", "8", "--eval.wer_utterances", "4"),
        ],
        cwd=storage / "broken",
        env=cluster.user(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return Sent(storage / "sent", done.stdout, began, time.time())


def _command(cluster: RunningCluster, storage: Path, name: str) -> list[str]:
    return [
        *(sys.executable, "-m", "jobs.submit", "--config", str(ROOT / "configs/scratch.yaml")),
        *("--address", cluster.address, "--run.name", name, "--run.storage", str(storage)),
        *("--encoder.labels", "{pool: encoder}", "--train.labels", "{pool: trainer}"),
    ]


def _unusable_recording(folder: Path) -> Path:
    """A manifest of one recording of which only decoding finds that it cannot be used."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    noise[100] = np.nan
    soundfile.write(folder / "broken.wav", noise, 16_000, subtype="FLOAT")
    row = {"id": "broken", "audio": "broken.wav", "text": "One of these is no number."}
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "manifest.jsonl"


def test_a_run_from_another_directory_ends_well(sent: Sent) -> None:
    summary = json.loads((sent.folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["rejects"] == {"not finite": 1}
    assert (sent.folder / "report.html").is_file()


def test_each_pool_does_its_own_work(cluster: RunningCluster, sent: Sent) -> None:
    """Trainers by the run's own books, encoders by Ray's."""
    (attempt,) = [row for row in read_events(sent.folder) if row["event"] == "attempt"]
    assert attempt["nodes"] == [cluster.nodes["trainer"]]
    ran = [(actor["class_name"], actor["node_id"]) for actor in cluster.state("actors")]
    encoders = {node for name, node in ran if "_EncodeActor" in name}
    assert encoders == {cluster.nodes["encoder"]}
    assert {node for name, node in ran if name == "RayTrainWorker"} == {cluster.nodes["trainer"]}


def test_each_step_is_told_once(sent: Sent) -> None:
    told = re.findall(rf"^ +(\d+)/{STEPS} loss ", sent.output, re.M)
    assert told == [str(step) for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY)], sent.output
    for step in (30, 60):
        assert len(re.findall(rf"^ +{step} dev loss ", sent.output, re.M)) == 1, sent.output


def test_the_log_holds_nothing_of_rays(sent: Sent) -> None:
    noise = [line for line in sent.output.splitlines() if re.search(NOISE, line)]
    # The job server writes this line itself, before there is a job.
    assert [line for line in noise if "Runtime env is setting up" not in line] == []


def _panels() -> list[Any]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [pytest.param(p, id=p["title"]) for p in panels if p["type"] != "row"]


@pytest.mark.parametrize("panel", _panels())
def test_a_panel_of_the_dashboard_shows_the_run(
    panel: dict[str, Any], prometheus: Prometheus, sent: Sent
) -> None:
    """Each query of the panel brings numbers, and the labels that its legend names."""
    assert panel["targets"]
    for target in panel["targets"]:
        expression = target["expr"].replace("$run", "sent").replace("$__rate_interval", "20s")
        assert "$" not in expression
        series = prometheus.over(expression, sent.began, sent.ended)
        if panel["title"] in EMPTY:
            assert series == [], f"{panel['title']} has data: take it off the list"
            continue
        values = [float(value) for row in series for _, value in row["values"]]
        assert any(map(math.isfinite, values)), f"no data: {expression}"
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert all(labels <= row["metric"].keys() for row in series), series


def test_the_variable_of_the_dashboard_lists_the_run(prometheus: Prometheus, sent: Sent) -> None:
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    asked = [variable for variable in variables if variable["type"] == "query"]
    assert asked
    for variable in asked:
        query = variable["query"]["query"]
        assert query == variable["definition"]
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
        values = prometheus.ask(
            f"label/{label}/values", **{"match[]": metric, "start": sent.began, "end": sent.ended}
        )
        assert values == ["sent"]


def test_what_a_run_counts_is_what_is_scraped(prometheus: Prometheus, sent: Sent) -> None:
    def last(metric: str) -> dict[str, float]:
        series = prometheus.over(f'{metric}{{run="sent"}}', sent.began, sent.ended)
        return {row["metric"].get("reason", ""): float(row["values"][-1][1]) for row in series}

    assert last("ray_omni_bins_total") == {"": STEPS}
    assert last("ray_omni_rejects_total") == {"not finite": 1}
    rows = [json.loads(line) for line in (sent.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert last("ray_omni_utterances_total") == {"": sum(row["utterances"] for row in trained)}


def test_figures_stay_until_there_are_newer_ones(prometheus: Prometheus, sent: Sent) -> None:
    """An evaluation is told once, and shown until the next: alerts look at it for minutes."""
    series = prometheus.over('ray_omni_dev_loss{run="sent"}', sent.began, sent.ended)
    (row,) = series
    times = [when for when, _ in row["values"]]
    gaps = [late - early for early, late in zip(times, times[1:], strict=False)]
    assert len(times) > 3 and max(gaps) <= 6, times


def test_alert_rules_can_be_evaluated(prometheus: Prometheus, sent: Sent) -> None:
    (group,) = prometheus.ask("rules")["groups"]
    assert group["file"] == str(ALERTS)
    [written] = yaml.safe_load(ALERTS.read_text())["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == {
        rule["alert"]: "ok" for rule in written["rules"]
    }


def test_a_job_that_is_stopped_leaves_a_checkpoint(
    cluster: RunningCluster, sent: Sent, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Ray's own client, while `jobs.submit` follows the job."""
    process = subprocess.Popen(
        [*_command(cluster, storage, "stopped"), "--train.log_every", "1"],
        cwd=storage,
        env=cluster.user(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output, job = "", ""
    for line in process.stdout:
        output += line
        job = job or "".join(re.findall(r"^raysubmit_\w+", line))
        if re.match(r" +3/900 ", line):
            break
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    client = connect(cluster.address)
    assert client.get_job_status(job) == JobStatus.RUNNING, output
    assert client.stop_job(job)
    output += process.stdout.read()
    assert process.wait(180) == 130, output
    (step,) = re.findall(r"the checkpoint of step (\d+) is saved", output)
    state = read_checkpoint(storage / "stopped/checkpoints/last").state
    assert state.step == int(step) >= 3
    assert client.get_job_status(job) == JobStatus.STOPPED
