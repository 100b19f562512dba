"""The list of metrics, against those who rely on it: the dashboard, the alerts and the document."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ray.util.metrics import Counter, Gauge

from omni.metrics.prometheus import METRICS

ROOT = Path(__file__).parents[2]
ENDINGS = {Gauge: [""], Counter: ["_total"]}
EXPORTED = {
    f"ray_{name}{ending}": known
    for name, known in METRICS.items()
    for ending in ENDINGS.get(known.kind, ["_bucket", "_sum", "_count"])
}


@pytest.mark.parametrize("file", ["configs/grafana/omni.json", "configs/grafana/alerts.yaml"])
def test_what_is_asked_for_is_exported(file: str) -> None:
    asked = set(re.findall(r"ray_omni_\w+", (ROOT / file).read_text()))
    assert asked and asked <= set(EXPORTED)


def test_labels_that_the_dashboard_selects_exist() -> None:
    text = (ROOT / "configs/grafana/omni.json").read_text()
    for name, selectors in re.findall(r"(ray_omni_\w+)\{(.*?)\}", text):
        labels = set(re.findall(r"(\w+)=", selectors))
        assert "run" in labels and labels <= {"run", *EXPORTED[name].labels}


def test_the_document_lists_every_metric() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (\w+) \| (.*?) \|$", (ROOT / "docs/metrics.md").read_text(), re.M
    )
    assert {
        name: (tuple(re.findall(r"\w+", labels)), kind, about) for name, labels, kind, about in rows
    } == {
        name: (known.labels, known.kind.__name__.lower(), known.about)
        for name, known in METRICS.items()
    }


def test_panels_have_places_and_titles_of_their_own() -> None:
    panels = json.loads((ROOT / "configs/grafana/omni.json").read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
