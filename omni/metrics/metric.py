"""A line of the table of metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Kind = Literal["gauge", "counter", "total", "histogram"]


@dataclass(frozen=True)
class Metric:
    """A line of the table.

    value: the formula; a mapping has an entry for each value of the label. prometheus: name there.
    kind: a counter adds up the values of the rows; a total is a counter whose value is the sum so
    far. group: of the curve in trackers, "" for no curve. name: key in metrics.jsonl. optional:
    left out of metrics.jsonl while it is None.
    """

    unit: str
    help: str
    value: Callable[[Any], Any] | None = None
    prometheus: str | None = None
    kind: Kind = "gauge"
    labels: tuple[str, ...] = ()
    group: str | None = None
    name: str = ""
    optional: bool = False

    @property
    def curve(self) -> str:
        """Name in trackers, such as dev/loss."""
        if not self.group or self.group == self.name:
            return self.group or ""
        return f"{self.group}/{self.name.removeprefix('dev_')}"


def metric(*line: Any, **options: Any) -> Any:
    """Declare a field of a row by its line of the table."""
    return field(metadata={"metric": Metric(*line, **options)})


def metrics_of(row: type, group: str) -> tuple[Metric, ...]:
    """Collect the lines of a row's fields; `group` is for those that name none."""
    declared = {f.name: f.metadata["metric"] for f in fields(row) if f.metadata}
    return tuple(
        replace(m, name=name, group=group if m.group is None else m.group)
        for name, m in declared.items()
    )
