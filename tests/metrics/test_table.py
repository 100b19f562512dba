"""The table of metrics, against the dashboard, the alerts, the documentation and the rows."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

from omni.checkpoint.train_state import TrainState
from omni.metrics.doc_table import PAGE, page
from omni.metrics.rows import Measured, Pools, Window, train_row
from omni.metrics.sums import LossTotals, pack_losses
from omni.metrics.table import METRICS, PROMETHEUS, StepSums, to_json
from omni.model.speech_lm import LossSums

ROOT = Path(__file__).parents[2]
ENDINGS = {
    "gauge": [""],
    "counter": ["_total"],
    "total": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
}
EXPORTED = {
    f"ray_{name}{ending}": metric
    for name, metric in PROMETHEUS.items()
    for ending in ENDINGS[metric.kind]
}


@pytest.mark.parametrize("file", ["configs/grafana/omni.json", "configs/grafana/alerts.yaml"])
def test_the_dashboard_and_the_alerts_use_exported_metrics(file: str) -> None:
    used = set(re.findall(r"ray_omni_\w+", (ROOT / file).read_text()))
    assert used and used <= set(EXPORTED)


def test_the_dashboard_selects_existing_labels() -> None:
    text = (ROOT / "configs/grafana/omni.json").read_text()
    for name, selectors in re.findall(r"(ray_omni_\w+)\{(.*?)\}", text):
        labels = set(re.findall(r"(\w+)=", selectors))
        assert "run" in labels and labels <= {"run", *EXPORTED[name].labels}


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((ROOT / "configs/grafana/omni.json").read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (p["x"] + right, p["y"] + down)
        for p in places
        for right in range(p["w"])
        for down in range(p["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_the_documentation_says_what_to_do_about_each_alert() -> None:
    [group] = yaml.safe_load((ROOT / "configs/grafana/alerts.yaml").read_text())["groups"]
    rows = re.findall(r"^\| `(Omni\w+)` \| (\w+) \| .+ \| .+ \|$", (ROOT / PAGE).read_text(), re.M)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in group["rules"]]


def test_the_documentation_holds_the_table() -> None:
    text = (ROOT / PAGE).read_text()
    assert page(text) == text, "run python -m omni.metrics.doc_table"
    assert all(f"`{metric.name or metric.prometheus}`" in text for metric in METRICS)


def test_prometheus_names_are_unique() -> None:
    assert len(PROMETHEUS) == sum(metric.prometheus is not None for metric in METRICS)


def test_sums_survive_packing() -> None:
    tasks = torch.tensor([[0.1, 3, 1], [2e9 + 1, 5, 2]], dtype=torch.float64)
    sums = StepSums(1 / 3, 8, 3, 0.5, kl=0.25, utterances=2**40 + 1, stop=1, tasks=tasks)
    packed = sums.pack()
    assert (
        packed.dtype == torch.float64 and len(packed) == len(fields(StepSums)) - 1 + tasks.numel()
    )
    back = StepSums.unpack(packed)
    assert torch.equal(back.tasks, tasks)
    assert replace(back, tasks=tasks) == sums
    back += StepSums(samples=7)
    assert (back.samples, back.utterances, back.counted) == (7, 2**40 + 1, 8)


def test_losses_of_a_batch_survive_packing() -> None:
    given = {name: torch.tensor(value) for value, name in enumerate(("loss", "tokens", "correct"))}
    out = LossSums(**given, tasks=torch.tensor([[1.5, 2, 1], [0.5, 4, 3]]))
    totals = LossTotals.of_losses(pack_losses(out))
    assert (totals.loss, totals.tokens, totals.correct, totals.kl) == (0, 1, 2, 0)
    assert totals.counted == 6


def measured(**sums: float) -> Measured:
    window = Window(
        StepSums(**sums), busy=2.0, wait=0.5, steps=4, lm_tokens=sums.get("tokens", 0.0)
    )
    state = TrainState(step=4, bins_consumed=16, epoch=0.12345, seconds=9.876)
    return Measured(state, window, 10, 1e-3, 1.5, Pools(1, 2), {"wait": 0.5}, mfu=0.1)


def test_a_training_row_holds_means_and_rates() -> None:
    given = measured(loss=6.0, tokens=4.0, correct=1.0, ctc=2.0, utterances=3, samples=32_000)
    given.sums.tasks = torch.tensor([[6.0, 4.0, 1.0]], dtype=torch.float64)
    row = to_json(train_row(given))
    assert "kl" not in row and "tasks" not in row, "not of this run"
    assert row["loss"] == 1.5 and row["accuracy"] == 0.25 and row["ctc"] == 0.5
    assert row["audio_seconds_per_second"] == 1.0 and row["tokens_per_second"] == 2.0
    assert row["data_wait_fraction"] == 0.25 and row["mfu"] == 0.1
    assert row["epoch"] == 0.1235 and row["seconds"] == 9.88 and row["bins"] == 16
    assert row["limit"] == "stream" and row["busy"]["trainer"] == 0.75
    assert json.loads(json.dumps(row)) == row


def test_a_row_without_text_tokens_has_no_loss() -> None:
    row = train_row(measured(ctc=2.0, tokens=4.0))
    assert row.loss is None and row.accuracy is None and row.ctc == 0.5


def test_the_loss_is_that_of_the_steps_that_ran_the_language_model() -> None:
    tasks = torch.tensor([[6.0, 4.0, 1.0]], dtype=torch.float64)
    given = measured()
    given.window.add(StepSums(tokens=12, ctc=12.0), 1.0, 0.0, False)
    given.window.add(StepSums(loss=6.0, tokens=4, ctc=4.0, kl=2.0, tasks=tasks), 1.0, 0.0, False)
    row = train_row(given)
    assert (row.loss, row.kl, row.ctc) == (1.5, 0.5, 1.0)


def test_tasks_before_the_first_update_have_no_figures() -> None:
    row = train_row(replace(measured(), names=["write", "translate"]))
    assert row.tasks == {}
