"""Tables, lines and confusion matrices of tasks, for the pages and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from omni.report.charts import Figure
from omni.report.number_text import count, finite, interval, percent, short

Row = dict[str, Any]
Scores = Mapping[str, Mapping[str, Any]]  # figures by task
HEAD = (
    "Task", "Corpus", "Utterances", "Metric", "Value", "95 %", "Most frequent", "Chance",
    "With other audio", "Macro F1", "Calibration error", "Exact match", "Shuffled-audio gap",
)  # fmt: skip
NOTE = (
    "95 %: of a share of right answers (Wilson 1927). "
    "Most frequent: share of the most frequent class. With other audio: accuracy when each "
    "question is asked about another recording. Calibration error: of the probabilities of the "
    "choices (expected, 10 bins). Exact match: answers as written. Shuffled-audio gap: nats per "
    "token."
)
_OF_100 = ("bleu", "chrf")
_NAMES = {
    "wer": "WER", "cer": "CER", "accuracy": "accuracy", "macro_f1": "macro F1",
    "exact_match": "exact match", "bleu": "BLEU", "chrf": "chrF",
}  # fmt: skip
_WIDTH, _TOP, _LEFT = 440, 40, 110
"""SVG units: width of a matrix, and its distances from the top and from the left."""
_LABEL = 16
"""Characters of a class that are shown."""


def metric_text(metric: object, value: object) -> str:
    """Write the figure of a metric, e.g. `accuracy 83.1 %` or `BLEU 31.4`."""
    number = (f"{value:.1f}" if finite(value) else "–") if metric in _OF_100 else percent(value)
    return f"{_NAMES.get(str(metric), str(metric))} {number}"


def task_line(figures: Mapping[str, Any]) -> str:
    """Write the figures of a task in one line, for the terminal."""
    beside = {
        "most frequent class": percent(figures.get("majority")),
        "chance": percent(figures.get("chance")),
        "with other audio": percent(figures.get("shuffled_accuracy")),
        "macro F1": percent(figures.get("macro_f1")),
        "calibration error": percent(figures.get("ece")),
    }
    if figures.get("metric") == "macro_f1":
        beside = {"accuracy": percent(figures.get("accuracy")), **beside}
        del beside["macro F1"]
    for name, tag in _tags(figures).items():
        beside[f"<{name}>"] = percent(tag.get("accuracy"))
    known = [f"{name} {text}" for name, text in beside.items() if text != "–"]
    text = metric_text(figures.get("metric"), figures.get("value"))
    return f"{text} ({', '.join(known)})" if known else text


def task_rows(split: str, scores: object, losses: object) -> list[tuple[str, ...]]:
    """Lay out the figures of a split's tasks, and of their tags, under `HEAD`.

    losses: `dev_tasks`, which has the shuffled-audio gap of each task.
    """
    rows: list[tuple[str, ...]] = []
    gaps = _mappings(losses)
    for name, figures in _mappings(scores).items():
        gap = short(gaps.get(name, {}).get("gap"))
        rows.append(_task_row(name, split, figures, gap))
        rows += [
            _task_row(f"{name} <{tag}>", split, {"metric": "accuracy", **of_tag}, "–")
            for tag, of_tag in _tags(figures).items()
        ]
    return rows


def _task_row(name: str, split: str, figures: Mapping[str, Any], gap: str) -> tuple[str, ...]:
    metric = str(figures.get("metric"))
    label = _NAMES.get(metric, metric)
    return (
        name,
        split,
        count(figures.get("utterances")),
        label,
        metric_text(metric, figures.get(metric)).removeprefix(f"{label} "),
        interval(figures.get(f"{metric}_interval")),
        *(percent(figures.get(key)) for key in ("majority", "chance", "shuffled_accuracy")),
        *(percent(figures.get(key)) for key in ("macro_f1", "ece", "exact_match")),
        gap,
    )


def confusions(title: str, scores: object) -> list[Figure]:
    """Draw the confusion matrix of each task, and of each of its tags."""
    figures = []
    for name, of_task in _mappings(scores).items():
        parts = {name: of_task, **{f"{name} <{tag}>": f for tag, f in _tags(of_task).items()}}
        for part, found in parts.items():
            classes, matrix = found.get("classes"), found.get("confusion")
            if isinstance(classes, list) and isinstance(matrix, list) and len(classes) > 1:
                figures.append(confusion(f"{part}, {title}", classes, matrix))
    return figures


def confusion(title: str, classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Figure:
    """Draw a confusion matrix: a row for each label, shaded by the share of its answers."""
    size = (_WIDTH - _LEFT) / len(classes)
    height = min(size, 40.0)
    svg = f'<text x="{_LEFT + (_WIDTH - _LEFT) / 2}" y="11">answer</text>'
    for n, name in enumerate(classes):
        middle = _LEFT + (n + 0.5) * size
        if size >= 40:
            svg += f'<text x="{middle:.2f}" y="{_TOP - 8}">{_label(name, int(size / 6))}</text>'
        y = _TOP + (n + 0.5) * height
        svg += f'<text class="y" x="{_LEFT - 6}" y="{y:.2f}" dy=".35em">{_label(name)}</text>'
    for i, row in enumerate(matrix):
        whole = sum(row)
        for j, many in enumerate(row):
            x, y = _LEFT + j * size, _TOP + i * height
            share = many / whole if whole else 0.0
            shown = f"{classes[i]} → {classes[j]}: {count(many)} of {count(whole)}"
            svg += (
                f'<rect class="heat" x="{x:.2f}" y="{y:.2f}" width="{max(size - 1, 1):.2f}" '
                f'height="{max(height - 1, 1):.2f}" fill-opacity="{0.06 + 0.7 * share:.3f}">'
                f"<title>{escape(shown)}</title></rect>"
            )
            if many and size >= 24:
                svg += (
                    f'<text class="cell" x="{x + size / 2:.2f}" y="{y + height / 2:.2f}" '
                    f'dy=".35em">{count(many)}</text>'
                )
    bottom = round(_TOP + len(classes) * height) + 4
    return Figure(title, "label by answer", Markup(svg), width=_WIDTH, height=bottom)


def _label(name: str, most: int = _LABEL) -> str:
    shown = name if len(name) <= most else f"{name[: max(most - 1, 1)]}…"
    return str(escape(shown))


def claims(row: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Return (tag, claimed, label, right) of a rich transcript."""
    return [
        (name, str(tag.get("claimed") or "–"), str(tag.get("label") or "–"), _agree(tag))
        for name, tag in _mappings(row.get("tags")).items()
    ]


def _agree(tag: Mapping[str, Any]) -> bool:
    claimed, label = (str(tag.get(key)).casefold() for key in ("claimed", "label"))
    return claimed == label


def choice_shares(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the choices of a row with their probabilities, the most likely first."""
    from omni.metrics.task_scores import probabilities

    given = row.get("choices")
    if not isinstance(given, dict) or not given or not all(map(finite, given.values())):
        return []
    shares = probabilities(given)
    return [(name, percent(shares[name])) for name in sorted(shares, key=lambda n: -shares[n])][:5]


def _tags(figures: Mapping[str, Any]) -> dict[str, Row]:
    return _mappings(figures.get("tags"))


def _mappings(given: object) -> dict[str, Row]:
    """Return what is as it should be of a file that a killed run may have left."""
    found = given if isinstance(given, dict) else {}
    return {str(name): value for name, value in found.items() if isinstance(value, dict)}
