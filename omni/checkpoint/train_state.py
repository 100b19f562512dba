"""Training state that a checkpoint carries beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Progress of a run. `bins_consumed` is the whole resume state of the data."""

    step: int = 0
    bins_consumed: int = 0
    epoch: float = 0.0
    seconds: float = 0.0
    """Seconds of training steps, over all attempts."""
    best_value: float | None = None
    """Best value of `eval.best` so far: the lowest loss or error rate, the highest accuracy."""
    best_metric: str = ""
    """Metric of `best_value`, with its decoder; empty in checkpoints of versions that decoded by
    the language model alone. See `omni.metrics.best_figure.BestFigure.measured`."""
    best_step: int | None = None
    evaluations_since_best: int = 0
    mean_norm: float = 0.0
    """Mean gradient norm of the updates, forgetting those more than about 50 updates ago."""
    updates: int = 0
    """Updates that `mean_norm` covers."""
    skipped: int = 0
    """Steps without an update."""
    skipped_in_row: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Digests of index, tokenizer, plan, model, encoder and augmentation."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Rejected recordings by reason."""
    totals: dict[str, Any] = field(default_factory=dict)
    """Sums over all steps, of `omni.metrics.rows.Window`; empty in checkpoints of 0.1."""
    window: dict[str, Any] = field(default_factory=dict)
    """Sums over the steps since the last log line, likewise."""

    def measure_best(self, metric: str, before: str) -> str | None:
        """Let `best_value` measure `metric` from now on.

        before: what it measures in checkpoints that do not say. If that is another thing, the value
        is forgotten, and what it measured is returned.
        """
        measured, self.best_metric = self.best_metric or before, metric
        if self.best_value is None or measured == metric:
            return None
        self.best_value, self.evaluations_since_best = None, 0
        return measured
