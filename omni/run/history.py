"""Keep the history of a run over its drivers: changed settings and wall time."""

from __future__ import annotations

import contextlib
from typing import Any

import yaml

from omni.config import Config
from omni.metrics.follower import METRICS
from omni.metrics.run_files import read_events
from omni.storage.path import StoragePath

STARTED = "started"
"""Event of a driver that starts or continues the run."""
TAKEOVER = "takeover"
"""Event of a driver that continues the run of one that did not end by itself."""


def changed_settings(config: Config) -> dict[str, tuple[Any, Any]]:
    """Return (before, after) of each setting that differs from the run's config.yaml.

    Settings that an older version did not know are left out.
    """
    before: Any = None
    with contextlib.suppress(OSError, yaml.YAMLError):
        before = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    old = _flat(before if isinstance(before, dict) else {})
    new = _flat(yaml.safe_load(config.to_yaml()))
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def describe_change(name: str, change: tuple[Any, Any]) -> str:
    before, after = change
    return f"{name} {_text(before)} -> {_text(after)}"


def earlier_wall_seconds(run_dir: StoragePath, trained: float) -> float:
    """Return the wall time of all earlier drivers of a run, in seconds.

    trained: seconds of training steps so far, the answer for a run of a version that did not record
    its drivers. A driver that was killed ends with the last row that it wrote.
    """
    total = begin = end = None
    for event in read_events(run_dir):
        moment = event.get("time")
        if not isinstance(moment, (int, float)):
            continue
        if event["event"] == STARTED:
            total, begin = float(event.get("wall_seconds", 0.0)), moment
        end = moment
    if total is None or begin is None or end is None:
        return trained
    with contextlib.suppress(OSError):
        written = (run_dir / METRICS).stat().st_mtime_ns
        end = max(end, (written or 0) / 1e9)
    return total + max(0.0, end - begin)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return {"section.field": value}."""
    return {
        f"{section}.{name}": value
        for section, fields in values.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
