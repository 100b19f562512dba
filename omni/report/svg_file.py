"""Write charts as one SVG file, for pages that cannot hold HTML."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from omni.report.charts import Figure
from omni.report.render import render

_ACROSS, _GAP, _HEAD = 2, 30, 34


def svg_file(figures: Sequence[Figure]) -> str:
    """Return charts of the same size as one SVG file, two in a row."""
    width, height = figures[0].width + _GAP, figures[0].height + _HEAD + _GAP
    body = Markup()
    for number, figure in enumerate(figures):
        x, y = number % _ACROSS * width, number // _ACROSS * height
        keys = Markup().join(
            Markup('<tspan class="{}" dx="10">— {}</tspan>').format(key.style, key.label)
            for key in figure.keys
            if key.label
        )
        title = f"{figure.title}, {figure.unit}" if figure.unit else figure.title
        body += Markup(
            '<g transform="translate({},{})"><text class="title" x="50" y="-18">{}</text>'
            '<text class="keys" x="42" y="-3">{}</text>{}</g>'
        ).format(x, y + _HEAD, title, keys, figure.svg)
    rows = -(-len(figures) // _ACROSS)
    return render("charts.svg", body=body, width=_ACROSS * width, height=rows * height)
