"""Show a probe of the encoder's layers: a page with a chart per label, and tables."""

from __future__ import annotations

from dataclasses import dataclass

from omni.report.charts import Chart, Figure
from omni.report.render import render
from omni.report.svg_file import svg_file
from omni.texture.linear_probe import Score
from omni.texture.probe import LabelProbe, ProbeResult

_CURVES = [
    ("encoder", "layer:accuracy"),
    ("random weights", "random:accuracy"),
    ("log-mel", "mel:accuracy"),
    ("largest class", "majority"),
]
HEAD = ("features", "accuracy, %", "95 %", "macro F1, %")


@dataclass(frozen=True)
class ShownLabel:
    """Rows and remarks of one label on the page."""

    name: str
    facts: str
    left_out: str
    classes: str
    rows: list[list[str]]


def page(result: ProbeResult) -> str:
    """Return the page as HTML, one file without outside references."""
    return render(
        "probe.html",
        name="Layers of the encoder",
        result=result,
        figures=[chart(label) for label in result.labels],
        head=HEAD,
        labels=[_shown(label) for label in result.labels],
    )


def chart(label: LabelProbe) -> Figure:
    """Draw accuracy over layers, with the interval of the encoder's."""
    rows = [
        {
            "step": number,
            "layer": vars(layer),
            "random": vars(random),
            "mel": vars(label.mel),
            "majority": label.majority,
        }
        for number, (layer, random) in enumerate(zip(label.layers, label.random, strict=True))
    ]
    title = f"{label.label}: {len(label.classes)} classes"
    band = ("layer:low", "layer:high")
    return Chart(title, "percent by layer", _CURVES, 100, band=band).draw(rows, label.best)


def standalone_svg(result: ProbeResult) -> str:
    """Return the charts as one SVG file."""
    return svg_file([chart(label) for label in result.labels])


def table(result: ProbeResult) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of all labels: accuracies with their intervals."""
    head = ["features", *(f"{label.label} ({len(label.classes)})" for label in result.labels)]
    rows = [["largest class", *(percent(label.majority) for label in result.labels)]]
    rows.append(["chance", *(percent(label.chance) for label in result.labels)])
    rows.append(["shuffled labels", *(with_interval(label.shuffled) for label in result.labels)])
    rows.append(["log-mel", *(with_interval(label.mel) for label in result.labels)])
    for number in range(len(result.labels[0].layers)):
        cells = []
        for label in result.labels:
            mark = " *" if number == label.best else " =" if number in label.as_good else ""
            cells.append(with_interval(label.layers[number]) + mark)
        rows.append([f"layer {number}", *cells])
    best_random = [max(label.random, key=lambda s: s.accuracy) for label in result.labels]
    rows.append(["random weights, best layer", *map(with_interval, best_random)])
    return head, rows


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def with_interval(scored: Score) -> str:
    return f"{percent(scored.accuracy)} ({percent(scored.low)}–{percent(scored.high)})"


def _shown(label: LabelProbe) -> ShownLabel:
    scores = [label.mel, *label.layers, *label.random, label.shuffled]
    rows = [["largest class", percent(label.majority), "", ""]]
    rows.append(["chance", percent(label.chance), "", ""])
    for scored in scores:
        interval = f"{percent(scored.low)} to {percent(scored.high)}"
        rows.append([scored.features, percent(scored.accuracy), interval, percent(scored.macro_f1)])
    unconverged = sum(scored.unconverged for scored in scores)
    return ShownLabel(
        name=label.label,
        facts=f"{label.utterances:,} utterances of {label.groups:,} {label.disjoint}s, none of "
        f"which is in both training and test. Best layer {label.best}; no difference shown from "
        f"{', '.join(map(str, label.as_good))}."
        + (f" {unconverged} probes stopped before convergence." if unconverged else ""),
        left_out=", ".join(f"{reason} {count:,}" for reason, count in label.left_out.items()),
        classes=", ".join(f"{name} {count:,}" for name, count in label.classes.items()),
        rows=rows,
    )
