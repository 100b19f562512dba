"""Curves and histograms as SVG, drawn by the template parts.html."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from omni.report.number_text import count, finite, short

Row = dict[str, Any]
Point = tuple[float, float]  # step, value

_WIDTH, _HEIGHT = 440, 220  # of the SVG coordinates, which the page stretches
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 424, 16, 196  # of the plot inside


@dataclass(frozen=True)
class Key:
    """A value in the caption, with the style of its curve."""

    label: str
    value: str
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """svg: what is drawn inside, of numbers only. empty: why nothing is drawn."""

    title: str
    unit: str
    svg: Markup = Markup()
    keys: tuple[Key, ...] = ()
    empty: str = ""
    width: int = _WIDTH
    height: int = _HEIGHT


@dataclass(frozen=True)
class Chart:
    """Values over steps.

    curves: pairs of a label and a key of metrics.jsonl; a key with colons leads into objects, as
    dev_tasks:emotion:loss. zero: the y axis includes 0. band: keys of the lower and upper bound of
    the first curve.
    """

    title: str
    unit: str
    curves: Sequence[tuple[str, str]]
    scale: float = 1
    zero: bool = True
    log_x: bool = False
    band: tuple[str, str] | None = None

    def draw(self, rows: list[Row], best: object) -> Figure:
        """best: the step to mark, if it is a number."""
        logged = [self._points(rows, key) for _, key in self.curves]
        known = [[p for p in points if math.isfinite(p[1])] for points in logged]
        curves = [[p for p in points if p[0] >= 1 or not self.log_x] for points in known]
        if not any(curves):
            never = any(logged) and not any(known)
            return Figure(self.title, self.unit, empty=" never finite" if never else " not logged")
        values = [value for curve in curves for _, value in curve] + [0.0] * self.zero
        low, high = (self._points(rows, key) for key in self.band) if self.band else ([], [])
        values += [value for _, value in low + high]
        axes = Axes.around([row["step"] for row in rows], values, self.log_x)
        svg, keys = axes.draw(best), []
        if low and high:
            svg += f'<path class="band" d="{_path(low + high[::-1], axes)}"/>'
        for n, curve in enumerate(curves):
            bad, label = len(logged[n]) - len(known[n]), self.curves[n][0]
            if curve:
                svg += _line(curve, axes, f"s{n}")
                style = f"{'key' if label else 'value'} s{n}"
                note = f" ({bad} not finite)" if bad else ""
                keys.append(Key(label, short(curve[-1][1]), style, note))
        svg += '<path class="cursor"/>'
        return Figure(self.title, self.unit, Markup(svg), tuple(keys))

    def _points(self, rows: list[Row], key: str) -> list[Point]:
        values = [(row["step"], _find(row, key)) for row in rows]
        return [(step, self.scale * v) for step, v in values if isinstance(v, int | float)]


def _find(row: Row, key: str) -> Any:
    value: Any = row
    for name in key.split(":"):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def histogram(title: str, unit: str, values: Sequence[float], whole: bool = False) -> Figure:
    """Count values by range. The last bar holds what lies beyond the 99.5th percentile.

    whole: the values are whole numbers, so that no bar is narrower than one.
    """
    known = sorted(values)
    if not known:
        return Figure(title, "none")
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
        shown = f"{short((first + n) * size)} to {short(upper)}: {count(many)}"
        svg += (
            f'<rect class="s0" x="{x}" y="{y}" width="{max(0.6 * width, width - 1):.2f}" '
            f'height="{_BOTTOM - y:.2f}"><title>{shown}</title></rect>'
        )
    keys = (Key("median", short(statistics.median(known))), Key("max", short(known[-1])))
    return Figure(title, unit, Markup(svg), keys)


def _bar_size(span: float, whole: bool) -> float:
    """Return 1, 2 or 5 times a power of ten, for at most about 30 bars."""
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
# For runs that log them:
CTC = Chart("CTC loss", "nats per token", [("train", "ctc"), ("dev", "dev_ctc")])
DECODERS = Chart(
    "Dev word error rate by decoder",
    "percent",
    [("eval.decode", "dev_wer"), ("language model", "dev_lm_wer"), ("CTC", "dev_ctc_wer")],
    100,
)
KL = Chart("Divergence from the teacher", "nats per token", [("train", "kl"), ("dev", "dev_kl")])
SPEED = [
    Chart("Trainer, audio", "audio s/s", [("", "audio_seconds_per_second")]),
    Chart("Trainer, tokens", "tokens/s", [("", "tokens_per_second")]),
    Chart("Waiting for data", "percent of time", [("", "data_wait_fraction")], 100),
]


@dataclass(frozen=True)
class Axes:
    """Axes of a plot from step `first` to `last` and from value `low` to `high`."""

    first: float
    last: float
    low: float
    high: float
    log_x: bool

    @classmethod
    def around(cls, steps: list[float], values: list[float], log_x: bool) -> Axes:
        """Span all steps, and a margin around the values that passes 0 only if they do."""
        low, high = min(values), max(values)
        margin = 0.04 * ((high - low) or abs(high) or 1)
        low = low - margin if low < 0 else max(0.0, low - margin)
        first = max(min(steps), 1) if log_x else min(steps)
        return cls(first, max(max(steps), first + 1), low, high + margin, log_x)

    def at(self, point: Point) -> Point:
        """Return the SVG coordinates of a step and a value."""
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
    """Draw few points with dots, many pale under their running median over a fortieth of them."""
    kept, many = _thin(points, axes), len(points) > 80
    values = " ".join(f"{step:.12g},{short(value)}" for step, value in kept)
    drawn = f'd="{_path(kept, axes)}" data-values="{values}"'
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
    """Keep the lowest and highest point of each pixel column: a small page that loses no spike."""
    columns = itertools.groupby(points, lambda point: round(axes.at(point)[0]))
    by_value = [sorted(column, key=lambda point: point[1]) for _, column in columns]
    return [point for column in by_value for point in sorted({column[0], column[-1]})]


def _path(points: list[Point], axes: Axes) -> str:
    """Return SVG path data; `h0` makes a single point a dot."""
    return "M" + "L".join("{},{}".format(*axes.at(point)) for point in points) + "h0"


def _ticks(low: float, high: float) -> list[float]:
    """Return about five multiples of 1, 2 or 5 times a power of ten between `low` and `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    size = next(m * power for m in (1, 2, 5, 10, 20) if high - low < 6 * m * power)
    return [n * size for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    digits = (1,) if high > 100 * low else (1, 2, 5)
    ticks = [d * 10.0**power for power in range(math.ceil(math.log10(high)) + 1) for d in digits]
    return [tick for tick in ticks if low <= tick <= high]
