"""Draw how time and memory grow: python -m omni.bench.growth_chart OUT.svg RESULT.json ...

The results are files of `omni bench corpus`, `stream` and `cache` (`--out`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omni.report.charts import Chart, Figure
from omni.report.svg_file import svg_file


def growth_charts(points: Iterable[dict[str, Any]]) -> list[Figure]:
    """Draw the points of `Result.growth`, a chart for each name."""
    charts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        charts.setdefault((point["chart"], point["unit"]), []).append(point)
    return [_chart(title, unit, of_chart) for (title, unit), of_chart in charts.items()]


def _chart(title: str, unit: str, points: list[dict[str, Any]]) -> Figure:
    curves = list(dict.fromkeys(point["curve"] for point in points))
    rows = [
        {"step": size, **{p["curve"]: p["value"] for p in points if p["size"] == size}}
        for size in sorted({point["size"] for point in points})
    ]
    return Chart(title, unit, [(curve, curve) for curve in curves], log_x=True).draw(rows, None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("omni.bench.growth_chart", description=__doc__)
    parser.add_argument("out", metavar="OUT.svg", type=Path)
    parser.add_argument("results", metavar="RESULT.json", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    points: list[dict[str, Any]] = []
    for result in arguments.results:
        found = json.loads(result.read_text()).get("growth")
        if not found:
            parser.error(f"{result}: expected a result of the suites corpus, stream or cache")
        points += found
    arguments.out.write_text(svg_file(growth_charts(points)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
