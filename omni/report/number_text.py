"""Numbers as text for people; a dash stands for a value that was not measured."""

from __future__ import annotations

import math
from typing import TypeGuard


def finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def short(value: object) -> str:
    """Format with four digits: 0.0312, 3e-4, 12.5k."""
    if not finite(value):
        return "–"
    if abs(value) >= 9999.5:
        return f"{value / 1e3:.4g}k" if abs(value) < 9999.5e3 else f"{value / 1e6:.4g}M"
    if 0 < abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}"


def count(value: object) -> str:
    return f"{value:,.0f}" if finite(value) else "–"


def percent(share: object) -> str:
    return f"{round(100 * share, 1):g} %" if finite(share) else "–"


def interval(shares: object) -> str:
    """Format two shares in percent: 12.5 to 14.1."""
    pair = shares if isinstance(shares, list | tuple) else ()
    known = len(pair) == 2 and all(map(finite, pair))
    return " to ".join(f"{100 * share:.1f}" for share in pair) if known else "–"


def clock(seconds: object) -> str:
    """Format as h:min:s."""
    if not finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
