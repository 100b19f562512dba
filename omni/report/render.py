"""Pages from the Jinja templates beside this file; whatever is put into one is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader

from omni.report.number_text import clock, count, percent, short

_PAGES = Environment(
    loader=PackageLoader("omni.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_PAGES.filters |= {"short": short, "count": count, "percent": percent, "clock": clock}


def render(template: str, **values: Any) -> str:
    return _PAGES.get_template(template).render(values)
