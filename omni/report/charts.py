"""Curves as inline SVG, and numbers as a person reads them: the drawing half of the report."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

Row = dict[str, Any]
Point = tuple[float, float]  # step, value

_WIDTH, _HEIGHT = 440, 220  # of the SVG coordinates, which the page stretches
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 424, 16, 196  # of the plot inside


@dataclass(frozen=True)
class Chart:
    """Values over steps: `curves` pairs a label with a key of metrics.jsonl.

    A key with colons leads into objects: dev_tasks:emotion:loss.
    """

    title: str
    unit: str
    curves: Sequence[tuple[str, str]]
    scale: float = 1
    zero: bool = True  # the y axis holds 0
    log_x: bool = False

    def draw(self, rows: list[Row], best: object) -> str:
        """A figure: title and key in HTML, curves and axes in SVG. best: the step to mark."""
        caption, svg = f"<b>{self.title}</b> <span>{self.unit}</span>", ""
        logged = [self._points(rows, key) for _, key in self.curves]
        known = [[p for p in points if math.isfinite(p[1])] for points in logged]
        curves = [[p for p in points if p[0] >= 1 or not self.log_x] for points in known]
        if not any(curves):
            caption += " never finite" if any(logged) and not any(known) else " not logged"
            return f"<figure><figcaption>{caption}</figcaption></figure>"
        values = [value for curve in curves for _, value in curve] + [0.0] * self.zero
        axes = Axes.around([row["step"] for row in rows], values, self.log_x)
        for n, curve in enumerate(curves):
            bad, label = len(logged[n]) - len(known[n]), self.curves[n][0]
            if curve:
                svg += _line(curve, axes, f"s{n}")
                caption += f'<span class="{"key" if label else "value"} s{n}">{label} '
                note = f" ({bad} not finite)" if bad else ""
                caption += f"<b>{short(curve[-1][1])}</b>{note}</span>"
        return f"""<figure><figcaption>{caption}</figcaption>
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{self.title} over steps">
{axes.draw(best)}{svg}<path class="cursor"/></svg></figure>"""

    def _points(self, rows: list[Row], key: str) -> list[Point]:
        values = [(row["step"], _find(row, key)) for row in rows]
        return [(step, self.scale * v) for step, v in values if isinstance(v, int | float)]


def _find(row: Row, key: str) -> Any:
    value: Any = row
    for name in key.split(":"):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def bars(title: str, unit: str, values: dict[str, float]) -> str:
    """A figure of horizontal bars, the largest as wide as the page allows."""
    largest = max(values.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="bar"><i style="width:{100 * v / largest:.1f}%"></i>'
        f"</td><td>{short(v)}</td></tr>"
        for name, v in values.items()
    )
    caption = f"<figcaption><b>{title}</b> <span>{unit}</span></figcaption>"
    return f"<figure>{caption}<table>{rows}</table></figure>"


def histogram(title: str, unit: str, values: Sequence[float], whole: bool = False) -> str:
    """A figure of how many values fall where. The last bar holds what lies beyond 99.5 %.

    whole: the values are whole numbers, and no bar is narrower than one.
    """
    known = sorted(values)
    if not known:
        return f"<figure><figcaption><b>{title}</b> <span>none</span></figcaption></figure>"
    low, high = known[0], known[round(0.995 * (len(known) - 1))]
    size = _bar_size(max(high - low, 1e-9), whole)
    first = math.floor(low / size + 1e-9)
    bars = max(1, math.floor(high / size + 1e-9) - first + 1)
    counts = [0] * bars
    for value in known:
        counts[min(math.floor(value / size + 1e-9) - first, bars - 1)] += 1
    axes = Axes(first * size, (first + bars) * size, 0, 1.04 * max(counts), False)
    svg = axes.draw(None)
    for n, many in enumerate(counts):
        x, y = axes.at(((first + n) * size, many))
        width = (_RIGHT - _LEFT) / bars
        upper = known[-1] if n == bars - 1 else (first + n + 1) * size
        said = f"{short((first + n) * size)} to {short(upper)}: {count(many)}"
        svg += (
            f'<rect class="s0" x="{x}" y="{y}" width="{max(0.6 * width, width - 1):.2f}" '
            f'height="{_BOTTOM - y:.2f}"><title>{said}</title></rect>'
        )
    caption = (
        f"<b>{title}</b> <span>{unit}</span><span>median "
        f"<b>{short(statistics.median(known))}</b></span><span>max <b>{short(known[-1])}</b></span>"
    )
    return f"""<figure><figcaption>{caption}</figcaption>
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{svg}</svg></figure>"""


def _bar_size(span: float, whole: bool) -> float:
    """1, 2 or 5 times a power of ten, for up to about 30 bars."""
    power = 10.0 ** math.floor(math.log10(span / 30))
    size = next(m * power for m in (1, 2, 5, 10, 20) if span <= 30 * m * power)
    return max(1.0, size) if whole else size


_LOSS = [("train", "loss"), ("dev", "dev_loss")]
LEARNING_WIDE = [
    Chart("Loss", "nats per token", _LOSS, zero=False),
    Chart("Loss over log steps", "nats per token", _LOSS, zero=False, log_x=True),
    Chart("Dev word error rate", "percent", [("WER", "dev_wer"), ("CER", "dev_cer")], 100),
    Chart("Shuffled-audio gap", "nats per token", [("dev", "shuffled_audio_gap")]),
]
LEARNING_SMALL = [
    Chart("Next-token accuracy", "percent", [("dev", "dev_accuracy")], 100),
    Chart("Learning rate", "", [("", "lr")]),
    Chart("Gradient norm", "", [("", "grad_norm")]),
]
# Of runs that have one:
CTC = Chart("CTC loss", "nats per token", [("train", "ctc"), ("dev", "dev_ctc")])
KL = Chart("Divergence from the reader", "nats per token", [("train", "kl"), ("dev", "dev_kl")])
SPEED = [
    Chart("Trainer, audio", "audio s/s", [("", "audio_seconds_per_second")]),
    Chart("Trainer, tokens", "tokens/s", [("", "tokens_per_second")]),
    Chart("Waiting for data", "percent of time", [("", "data_wait_fraction")], 100),
]


@dataclass(frozen=True)
class Axes:
    """The plot spans steps `first` to `last` and values `low` to `high`."""

    first: float
    last: float
    low: float
    high: float
    log_x: bool

    @classmethod
    def around(cls, steps: list[float], values: list[float], log_x: bool) -> Axes:
        """All steps of the run; a little more than the values, yet below 0 only if they are."""
        low, high = min(values), max(values)
        margin = 0.04 * ((high - low) or abs(high) or 1)
        low = low - margin if low < 0 else max(0.0, low - margin)
        first = max(min(steps), 1) if log_x else min(steps)
        return cls(first, max(max(steps), first + 1), low, high + margin, log_x)

    def at(self, point: Point) -> Point:
        """SVG coordinates of a step and a value."""
        x = (point[0] - self.first) / (self.last - self.first)
        y = (point[1] - self.low) / (self.high - self.low)
        if self.log_x:
            x = math.log(point[0] / self.first) / math.log(self.last / self.first)
        return round(_LEFT + x * (_RIGHT - _LEFT), 2), round(_BOTTOM - y * (_BOTTOM - _TOP), 2)

    def draw(self, best: object) -> str:
        svg = f'<path class="grid" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>'
        for value in _ticks(self.low, self.high):
            y = self.at((self.first, value))[1]
            svg += f'<path class="grid" d="M{_LEFT} {y}H{_RIGHT}"/>'
            svg += f'<text class="y" x="{_LEFT - 6}" y="{y}" dy=".35em">{short(value)}</text>'
        steps = (_log_ticks if self.log_x else _ticks)(self.first, self.last)
        for step in filter(float.is_integer, steps):
            x = self.at((step, self.low))[0]
            svg += f'<path class="grid" d="M{x} {_BOTTOM}v4"/>'
            svg += f'<text x="{x}" y="{_HEIGHT - 4}">{short(step)}</text>'
        if finite(best) and self.first <= best <= self.last:
            x = self.at((best, self.low))[0]
            svg += f'<path class="best" d="M{x} {_BOTTOM}V{_TOP}"/>'
            svg += f'<text x="{x}" y="{_TOP - 5}">best</text>'
        return svg


def _line(points: list[Point], axes: Axes, style: str) -> str:
    """Few points get dots; many are drawn pale under their running median, a fortieth wide."""
    kept, many = _thin(points, axes), len(points) > 80
    read_out = " ".join(f"{step:.12g},{short(value)}" for step, value in kept)
    drawn = f'd="{_path(kept, axes)}" data-values="{read_out}"'
    svg = f'<path class="{style}{" pale" * many}" {drawn}/>'
    if many:
        half, middle = min(len(points) // 80, 50), []
        columns = itertools.groupby(range(len(points)), lambda i: round(axes.at(points[i])[0]))
        for i in (next(column) for _, column in columns):
            reach = min(i, half)  # centred: a steep start stays steep
            window = [value for _, value in points[i - reach : i + reach + 1]]
            middle.append((points[i][0], statistics.median(window)))
        svg += f'<path class="{style}" d="{_path(middle, axes)}"/>'
    elif len(points) <= 40:
        dots = "".join(_path([point], axes) for point in points)
        svg += f'<path class="{style} dots" d="{dots}"/>'
    return svg


def _thin(points: list[Point], axes: Axes) -> list[Point]:
    """The lowest and the highest of each pixel column: a small page that loses no spike."""
    columns = itertools.groupby(points, lambda point: round(axes.at(point)[0]))
    by_value = [sorted(column, key=lambda point: point[1]) for _, column in columns]
    return [point for column in by_value for point in sorted({column[0], column[-1]})]


def _path(points: list[Point], axes: Axes) -> str:
    """SVG path data; `h0` makes a single point a dot."""
    return "M" + "L".join("{},{}".format(*axes.at(point)) for point in points) + "h0"


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about five, from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    size = next(m * power for m in (1, 2, 5, 10, 20) if high - low < 6 * m * power)
    return [n * size for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    digits = (1,) if high > 100 * low else (1, 2, 5)
    ticks = [d * 10.0**power for power in range(math.ceil(math.log10(high)) + 1) for d in digits]
    return [tick for tick in ticks if low <= tick <= high]


# ---- numbers; a dash stands for what was not measured


def finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def short(value: object) -> str:
    """Four digits: 0.0312, 3e-4, 12.5k."""
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


def clock(seconds: object) -> str:
    if not finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
