"""Draw how time and memory grow: python -m omni.bench.growth_chart OUT.svg RESULT.json ...

The results are files of `omni bench corpus`, `stream` and `cache` (`--out`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omni.report.charts import Chart, Figure
from omni.report.svg_file import svg_file


def growth_charts(points: Iterable[dict[str, Any]]) -> list[Figure]:
    """Draw the points of `Result.growth`, a chart for each name."""
    charts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        charts.setdefault((point["chart"], point["unit"]), []).append(point)
    return [_chart(title, unit, mine) for (title, unit), mine in charts.items()]


def _chart(title: str, unit: str, points: list[dict[str, Any]]) -> Figure:
    curves = list(dict.fromkeys(point["curve"] for point in points))
    rows = [
        {"step": size, **{p["curve"]: p["value"] for p in points if p["size"] == size}}
        for size in sorted({point["size"] for point in points})
    ]
    return Chart(title, unit, [(curve, curve) for curve in curves], log_x=True).draw(rows, None)


def main(argv: list[str]) -> int:
    out, *results = map(Path, argv)
    points = [point for result in results for point in json.loads(result.read_text())["growth"]]
    out.write_text(svg_file(growth_charts(points)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
