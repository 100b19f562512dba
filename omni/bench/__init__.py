"""Measure omni's speed, alone and against others, on this machine (`python -m jobs.bench`)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from omni.bench.timing import Result
from omni.config import Config
from omni.errors import ConfigError

_MODULES = {
    "encode": "encode_speed",
    "train-step": "step_speed",
    "stream": "stream_speed",
    "peer": "peer",
    "scale": "scale",
    "corpus": "corpus_speed",
    "cache": "cache_speed",
}


_SIZED = ("corpus", "cache")


def run_suite(name: str, config: Config, sizes: Sequence[int] | None = None) -> Result:
    """Run a suite: call the function bench_NAME of its module.

    sizes: rows or keys, for the suites that grow; None: those of the suite. Raises ConfigError.
    """
    if sizes is not None and name not in _SIZED:
        raise ConfigError(f"--sizes: is for {' and '.join(_SIZED)}, got the suite {name}")
    if sizes is not None and min(sizes) < 1:
        raise ConfigError(f"--sizes: expected 1 or more, got {min(sizes)}")
    module = importlib.import_module(f"omni.bench.{_MODULES[name]}")
    suite = getattr(module, f"bench_{name.replace('-', '_')}")
    result: Result = suite(config) if sizes is None else suite(config, sizes=sizes)
    return result


def show(result: Result) -> None:
    """Print the machine, notes, figures and ratios of a suite."""
    console = Console(highlight=False, soft_wrap=True)
    machine = result.machine
    console.print(
        f"[bold]{result.suite}[/] on {machine['device']}, {machine['cores']} cores, "
        f"{machine['threads']} thread(s) per process, torch {machine['torch']}"
    )
    for note in result.notes:
        console.print(f"  {note}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "value", "unit", ""):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in result.figures:
        table.add_row(row["name"], _number(row["value"]), row["unit"], row["note"])
    console.print(table)
    for name, value in result.ratio.items():
        console.print(f"  [bold]{name}[/] {_number(value)}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
