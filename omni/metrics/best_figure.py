"""Choose the best checkpoint by a figure of the evaluations (`eval.best`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omni.config.field_types import BEST_OF_TASK
from omni.corpus.tasks import TaskRule
from omni.metrics.table import EvalRow
from omni.metrics.task_scores import SPOKEN, Scoring


@dataclass(frozen=True)
class BestFigure:
    """Read and compare the figure that `eval.best` names.

    metric: of the task that it is about; None for the figures of all tasks, which are losses and
    error rates.
    """

    name: str
    metric: str | None = None

    @classmethod
    def of(cls, name: str, scoring: Scoring) -> BestFigure:
        task = task_of(name)
        return cls(name, None if task is None else scoring.metric(task))

    @property
    def higher_is_better(self) -> bool:
        return self.metric not in (None, *SPOKEN)

    def value(self, row: EvalRow) -> float | None:
        """Return the figure of an evaluation; None where it has none."""
        task = task_of(self.name)
        found: float | None = (
            getattr(row, self.name) if task is None else (row.dev_task_metrics or {}).get(task)
        )
        return None if found is None or not math.isfinite(found) else found

    def improves(self, value: float | None, best: float | None) -> bool:
        """Tell whether a figure is better than the best one so far, if there is any."""
        if value is None or best is None:
            return value is not None
        return value > best if self.higher_is_better else value < best

    def measured(self, decoder: str) -> str:
        """Say what is compared, for checkpoints: all but the loss depend on the decoder."""
        if self.name == "dev_loss":
            return self.name
        metric = "" if self.metric is None else f" ({self.metric})"
        return f"{self.name}{metric} by {decoder}"


def task_of(name: str) -> str | None:
    """Return the task that `eval.best` names; None for a figure of all tasks."""
    return name.removeprefix(BEST_OF_TASK) if name.startswith(BEST_OF_TASK) else None


def has_figure(rule: TaskRule, metric: str) -> bool:
    """Tell whether a task has a figure by its metric: answers with tags are not compared whole."""
    return not (rule.tags and metric == "exact_match")
