"""Metrics of transcripts that `eval.metrics` and `omni evaluate --metric` name as plug-ins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from omni.config.plug_in import check_methods, make_plug_in
from omni.errors import ConfigError, first_line


class TextMetric(Protocol):
    """Error rate of transcripts: errors and units are summed over utterances, then divided."""

    name: str
    """Key in metrics.jsonl, summary.json and transcripts."""

    def count(self, reference: str, hypothesis: str, language: str) -> tuple[float, float]:
        """Return the errors of an utterance, and the units in which they are counted."""
        ...


def load_metrics(names: Sequence[str], setting: str) -> list[TextMetric]:
    """Construct metrics and try each on two words.

    Raises ConfigError, naming the setting, for a metric with another interface.
    """
    metrics: list[TextMetric] = []
    for name in names:
        metric = make_plug_in(name, setting)
        check_methods(metric, name, setting, "count")
        label = getattr(metric, "name", None)
        if not isinstance(label, str) or not label or ":" in label:
            raise ConfigError(
                f"{setting}: {name}: expected the attribute name, a text without colons, "
                f"got {label!r}"
            )
        if label in (other.name for other in metrics):
            raise ConfigError(f"{setting}: {name}: another metric has the name {label}")
        try:
            _count(metric, "press two", "press to", "en")
        except Exception as error:
            raise ConfigError(
                f"{setting}: {name}: count('press two', 'press to', 'en') failed: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from None
        metrics.append(metric)
    return metrics


def score(rows: Sequence[dict[str, Any]], metrics: Sequence[TextMetric]) -> dict[str, float | None]:
    """Score transcript rows, each of which gets its own values as `metrics`.

    Returns the rate of each metric, None without units. An utterance on which a metric fails is
    left out of its rate, and counted as "NAME failed".
    """
    rates: dict[str, float | None] = {}
    for metric in metrics:
        errors, units, failed = 0.0, 0.0, 0
        for row in rows:
            own: dict[str, float | None] = row.setdefault("metrics", {})
            try:
                counted = _count(metric, row["reference"], row["hypothesis"], row["language"])
            except Exception:  # It must not end a training that took days.
                failed += 1
                own[metric.name] = None
                continue
            errors, units = errors + counted[0], units + counted[1]
            own[metric.name] = counted[0] / counted[1] if counted[1] else None
        rates[metric.name] = errors / units if units else None
        if failed:
            rates[f"{metric.name} failed"] = float(failed)
    return rates


def _count(
    metric: TextMetric, reference: str, hypothesis: str, language: str
) -> tuple[float, float]:
    errors, units = map(float, metric.count(reference, hypothesis, language))
    if not (math.isfinite(errors) and math.isfinite(units) and units >= 0):
        raise ValueError(f"expected finite errors and units of 0 or more, got {errors}, {units}")
    return errors, units
