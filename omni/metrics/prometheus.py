"""Export of a run's metrics as Ray metrics, which Prometheus collects from every node.

The metrics and their labels are those of `omni.metrics.table`. Labels are bounded: stages, phases,
reasons of rejects and ranks; never an utterance, a file or a step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

from ray.util.metrics import Counter, Gauge

from omni.metrics.metric import Metric
from omni.metrics.table import (
    EVAL_METRICS,
    EXPORTED,
    PROMETHEUS,
    TRAIN_METRICS,
    EvalRow,
    TrainRow,
)

_REFRESH_SECONDS = 1.0  # Ray's shortest interval between two reports of a process


@contextlib.contextmanager
def driver_publisher(run: str) -> Iterator[RayPublisher]:
    """Export that a driver trains the run, and where the block ends without an error, that it is to
    end: whoever sees a driver go without that can tell that it died.
    """
    began = int(time.time())
    publisher = RayPublisher(run)
    publisher.publish("omni_driver_began", began)
    try:
        yield publisher
        publisher.publish("omni_driver_ended", began)
    finally:
        publisher.close()


class RayPublisher:
    """Exporter of one process (`omni.train.recorder.Publisher`); rank 0 adds the run's metrics.

    rank: None for the driver.
    """

    def __init__(self, run: str, rank: int | None = None) -> None:
        self._rank = "" if rank is None else str(rank)
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        for name, metric in PROMETHEUS.items():
            labels = ("run", *metric.labels)
            if metric.kind == "gauge":
                self._gauges[name] = Gauge(name, metric.help, labels)
                self._gauges[name].set_default_tags({"run": run})
            elif metric.kind in ("counter", "total"):
                self._counters[name] = Counter(name, metric.help, labels)
                self._counters[name].set_default_tags({"run": run})
        self._totals: dict[tuple[str, str], float] = {}
        self._first_row = True
        self._shown: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, daemon=True, name="gauges").start()

    def close(self) -> None:
        """Let Ray forget the gauges; counters stay."""
        self._closed.set()

    def publish(self, name: str, value: float | Mapping[str, float]) -> None:
        """Export one metric of `EXPORTED`; a mapping holds the values by label.

        A gauge is set to the value, a counter grows by it. The label `rank` is added.
        """
        self._publish(PROMETHEUS[name], value)

    def train_row(self, row: TrainRow, rejects: Mapping[str, int], cache_full: bool) -> None:
        """Export a logged step; rejects: all so far, by reason."""
        # In the attempt that began the run, `seconds` are those of the first row's steps. A later
        # attempt cannot tell which part of a total an earlier one has already exported.
        began = row.seconds - row.step_seconds < 0.01  # seconds are rounded
        inherited = self._first_row and not began
        self._first_row = False
        for metric in TRAIN_METRICS:
            self._publish(metric, getattr(row, metric.name), inherited)
        for metric in EXPORTED:
            if metric.value is not None:
                self._publish(metric, metric.value(row))
        self._publish(PROMETHEUS["omni_rejects"], rejects, inherited)
        self._set("omni_cache_full", float(cache_full))

    def eval_row(self, row: EvalRow) -> None:
        for metric in EVAL_METRICS:
            self._publish(metric, getattr(row, metric.name))

    def _publish(
        self, metric: Metric, value: float | Mapping[str, float] | None, inherited: bool = False
    ) -> None:
        """Export one metric of a row; a mapping holds the values by label.

        inherited: a total may include what an earlier attempt exported.
        """
        if metric.prometheus is None or value is None:
            return
        rank = {"rank": self._rank} if "rank" in metric.labels else {}
        if isinstance(value, Mapping):
            (label,) = (label for label in metric.labels if label != "rank")
            figures = [(figure, {label: name, **rank}) for name, figure in value.items()]
        else:
            figures = [(value, rank)]
        for figure, labels in figures:
            if metric.kind == "gauge":
                self._set(metric.prometheus, figure, **labels)
            elif metric.kind == "counter":
                self._add(metric.prometheus, figure, **labels)
            else:
                self._add_total(metric.prometheus, figure, inherited, **labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._shown[name, str(sorted(labels.items()))] = (value, labels)
        self._gauges[name].set(value, tags=labels)

    def _refresh(self) -> None:
        """Set all gauges again, every second.

        Ray forgets a gauge that was not set for two reports. Steps and evaluations can be minutes
        apart, and alerts and the dashboard need the gauges most when a run hangs.
        """
        while not self._closed.wait(_REFRESH_SECONDS):
            for (name, _), (value, labels) in list(self._shown.items()):
                self._gauges[name].set(value, tags=labels)

    def _add(self, name: str, value: float, **labels: str) -> None:
        if value > 0:  # Ray refuses zero
            self._counters[name].inc(value, tags=labels)

    def _add_total(self, name: str, total: float, inherited: bool, **labels: str) -> None:
        """Increase a counter to `total`. The first inherited total is not counted again; a label
        that appears later begins at 0.
        """
        key = (name, str(sorted(labels.items())))
        self._add(name, total - self._totals.get(key, total if inherited else 0.0), **labels)
        self._totals[key] = total
