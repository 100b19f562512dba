"""The page of a run: figures, curves and test utterances in one file that needs no network."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

import soundfile

from omni.data.audio import AudioError, AudioSpan, decode
from omni.model.logmel import SAMPLING_RATE

Row = dict[str, Any]
Point = tuple[float, float]  # step, value

_TEST_UTTERANCES = 20
_REJECT_EXAMPLES = 5
_EMBED_BYTES = 300_000  # a larger file is decoded, to the span that the page plays
_EMBED_SECONDS = 60  # of decoded audio: an hour of WAV would make a page of 150 MB
_OGG, _WAV = "audio/ogg", "audio/wav"
_MIME = {".opus": _OGG, ".ogg": _OGG, ".mp3": "audio/mpeg", ".flac": "audio/flac", ".wav": _WAV}
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without spaces: a word is a character
_WORD = re.compile(rf"[{_CJK}]|[^\s\-–—{_CJK}]+")


def write_report(run: Path) -> Path:
    """Write `run/report.html` from whatever files the run left behind, and return its path.

    A missing or truncated file never fails it: an interrupted run needs its page the most.
    """
    metrics, broken = _rows(run / "metrics.jsonl")
    train, evals = _by_step(metrics, "train"), _by_step(metrics, "eval")
    summary = _parse(_text(run / "summary.json"))
    figures = _so_far(train, evals) if summary is None else summary
    name = escape(run.resolve().name)

    def curves(charts: list[Chart], layout: str) -> str:
        drawn = [chart.draw(train + evals, figures.get("best_step")) for chart in charts]
        return f'<div class="{layout}">{"".join(drawn)}</div>'

    small = _SMALL + [_CTC] * any(row.get("ctc") for row in train)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name} · omni</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main>
<h1>{name}</h1>{_status(summary, broken)}{_figures(figures)}
<h2>Learning</h2><p class="quiet">Numbers are the last logged. A long curve is drawn pale under its
running median.</p>{curves(_WIDE, "wide")}{curves(small, "small")}
<h2>Throughput</h2>{curves(_SPEED, "small")}{_stages(figures)}
<h2>Test utterances</h2>{_test_utterances(run)}
<h2>Last evaluation</h2>{_examples(evals)}
<h2>Rejected utterances</h2>{_rejects(run, figures.get("rejects"))}
<h2>Configuration</h2><details><summary>config.yaml</summary>
<pre>{escape(_text(run / "config.yaml")) or "missing"}</pre></details>
</main><script>{_SCRIPT}</script></body></html>
"""
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# ---- what the run left


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _parse(text: str) -> Row | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _rows(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSON-lines file, and how many lines are broken (a crash cuts one short)."""
    parsed = [_parse(line) for line in _text(path).split("\n") if line.strip()]
    return [row for row in parsed if row is not None], parsed.count(None)


def _by_step(rows: list[Row], kind: str) -> list[Row]:
    """Rows of a kind by step. A resumed run repeats steps; the last line is the one that counts."""
    last = {r["step"]: r for r in rows if r.get("kind") == kind and _finite(r.get("step"))}
    return [last[step] for step in sorted(last)]


def _so_far(train: list[Row], evals: list[Row]) -> Row:
    """What a summary would say by now, for a run that has none: the last values logged."""
    last_train, last_eval = ((rows or [{}])[-1] for rows in (train, evals))
    steps, seconds = (
        max((row[key] for row in (last_train, last_eval) if _finite(row.get(key))), default=None)
        for key in ("step", "seconds")
    )
    totals = {"steps": steps, "wall_seconds": seconds, "train_loss": last_train.get("loss")}
    return last_train | last_eval | totals


# ---- sections


def _status(summary: Row | None, broken: int) -> str:
    skipped = f"Unreadable lines of metrics.jsonl skipped: {broken}." if broken else ""
    if summary is None:
        return f"""<p class="notice"><b>Not finished.</b> There is no summary.json: the run was
interrupted or is still going. Figures are the last logged. {skipped}</p>"""
    facts = {
        "parameters": _count(summary.get("parameters")),
        "workers": _count(summary.get("workers")),
        "of features from the cache": _percent(summary.get("cached_fraction")),
    }
    known = [f"{value} {what}" for what, value in facts.items() if value != "–"]
    return f'<p class="quiet">{" · ".join(["Finished", *known])}. {skipped}</p>'


def _figures(s: Row) -> str:
    short, long = _percent(s.get("dev_wer_short")), _percent(s.get("dev_wer_long"))
    by_length = f"1–2 words {short}, 3 or more {long}" if {short, long} != {"–"} else ""
    wer = by_length or f"CER {_percent(s.get('dev_cer'))}"
    loss = f"nats per token; train {_short(s.get('train_loss'))}"
    gap = "dev loss with another utterance’s audio, minus dev loss; near 0, audio is ignored"
    tiles = [
        ("Dev WER", _percent(s.get("dev_wer")), wer),
        ("Test WER", _percent(s.get("test_wer")), f"CER {_percent(s.get('test_cer'))}"),
        ("Dev loss", _short(s.get("dev_loss")), loss),
        ("Shuffled-audio gap", _short(s.get("shuffled_audio_gap")), gap),
        ("Audio s/s", _short(s.get("audio_seconds_per_second")), "seconds of audio per second"),
        ("Wall time", _clock(s.get("wall_seconds")), "h:min:s"),
        ("Steps", _count(s.get("steps")), f"best {_count(s.get('best_step'))}"),
    ]
    cells = [
        f"<div><dt>{label}</dt><dd>{value}</dd><dd>{'' if note.endswith('–') else note}</dd></div>"
        for label, value, note in tiles
    ]
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _stages(figures: Row) -> str:
    encoder, trainer = "encoder_audio_seconds_per_second", "audio_seconds_per_second"
    rows = [
        ("Encoder", _short(figures.get(encoder)), ""),
        ("Trainer", _short(figures.get(trainer)), _percent(figures.get("data_wait_fraction"))),
    ]
    return _table(("Stage", "Audio seconds per second", "Time spent waiting for data"), rows)


def _test_utterances(run: Path) -> str:
    rows, _ = _rows(run / "transcripts-test.jsonl")
    if not rows:
        return '<p class="quiet">No test transcripts were written.</p>'
    shown = [_utterance(row, _audio(row)) for row in rows[:_TEST_UTTERANCES]]
    return f"""<p class="quiet">{len(shown)} of {len(rows)}. In a hypothesis:
<mark>another word</mark>, <ins>inserted</ins>, <del>missing</del>; case and punctuation do not
count.</p>{"".join(shown)}"""


def _examples(evals: list[Row]) -> str:
    last = next((row for row in reversed(evals) if row.get("examples")), None)
    if last is None:
        return '<p class="quiet">No evaluation wrote examples.</p>'
    shown = [_utterance(row, "") for row in last["examples"]]
    return f'<p class="quiet">Dev utterances at step {_count(last["step"])}.</p>{"".join(shown)}'


def _utterance(row: Row, audio: str) -> str:
    reference, hypothesis = (str(row.get(key) or "") for key in ("reference", "hypothesis"))
    wer = f"<p><b>{_percent(row['wer'])}</b> WER</p>" if "wer" in row else ""
    return f"""<article><div><small>{escape(str(row.get("id", "")))}</small>{audio}</div>
<dl><dt>reference</dt><dd>{escape(reference)}</dd>
<dt>hypothesis</dt><dd>{_marked(reference, hypothesis)}</dd></dl>{wer}</article>"""


def _audio(row: Row) -> str:
    """A player that holds the utterance: the file's own bytes if small, else its span as WAV."""
    path = Path(str(row.get("audio") or ""))
    span = AudioSpan(row.get("start") or 0.0, row.get("duration"))
    mime = _MIME.get(path.suffix.lower(), "")
    try:
        if not path.is_file():
            raise AudioError("missing", f"no such file: {path}")
        if mime and span == AudioSpan() and path.stat().st_size < _EMBED_BYTES:
            data = path.read_bytes()
        else:
            mime, wav = _WAV, io.BytesIO()
            samples = decode(path, span)[: _EMBED_SECONDS * SAMPLING_RATE]
            soundfile.write(wav, samples, SAMPLING_RATE, subtype="PCM_16", format="WAV")
            data = wav.getvalue()
    except (OSError, TypeError, ValueError) as error:  # of which AudioError is one
        return f'<p class="quiet">No audio: {escape(str(error))}</p>'
    text = base64.b64encode(data).decode()
    return f'<audio controls preload="metadata" src="data:{mime};base64,{text}"></audio>'


def _rejects(run: Path, counted: object) -> str:
    rows, _ = _rows(run / "rejects.jsonl")
    reasons = Counter(str(row.get("reason")) for row in rows)
    if not rows and counted:  # the file was lost on the way, the count was not
        reasons.update(counted if isinstance(counted, dict) else {"not recorded": counted})
    if not reasons.total():
        return '<p class="quiet">No utterance was rejected.</p>'
    keys = "id", "reason", "detail", "uri"
    examples = [[str(row.get(key) or "") for key in keys] for row in rows[:_REJECT_EXAMPLES]]
    counts = _table(("Reason", "Count"), [(k, _count(n)) for k, n in reasons.most_common()])
    return counts + (_table(("Example", "Reason", "Detail", "URI"), examples) if examples else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{line}</tr>" for line in (titles, *body))
    return f'<div class="table"><table>{lines}</table></div>'


# ---- words


def _marked(reference: str, hypothesis: str) -> str:
    """The hypothesis as written, its wrong words marked and the missing ones put in."""
    wanted, heard = ([m for m in _WORD.finditer(t) if _key(m[0])] for t in (reference, hypothesis))
    out, end = "", 0
    for i, j in _align([_key(m[0]) for m in wanted], [_key(m[0]) for m in heard]):
        right = "" if i is None else wanted[i][0]
        if j is None:
            out += f" <del>{escape(right)}</del> "
            continue
        word = escape(heard[j][0])
        if i is None:
            word = f"<ins>{word}</ins>"
        elif _key(right) != _key(heard[j][0]):
            word = f'<mark title="reference: {escape(right)}">{word}</mark>'
        out += escape(hypothesis[end : heard[j].start()]) + word
        end = heard[j].end()
    return out + escape(hypothesis[end:]) or '<i class="quiet">empty</i>'


def _key(word: str) -> str:
    """What is compared: letters, marks and numbers, without case."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def _align(wanted: list[str], heard: list[str]) -> list[tuple[int | None, int | None]]:
    """Positions in both on a shortest edit path (Levenshtein), None where one side has no word."""
    cost = [list(range(len(heard) + 1))]
    for i, word in enumerate(wanted, 1):
        row, above = [i], cost[-1]
        for j, other in enumerate(heard, 1):
            row.append(min(above[j - 1] + (word != other), above[j] + 1, row[-1] + 1))
        cost.append(row)
    path: list[tuple[int | None, int | None]] = []
    i, j = len(wanted), len(heard)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (wanted[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            path.append((i, j))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            path.append((i, None))
        else:
            j -= 1
            path.append((None, j))
    return path[::-1]


# ---- curves

_WIDTH, _HEIGHT = 440, 220  # of the SVG coordinates, which the page stretches
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 424, 16, 196  # of the plot inside


@dataclass(frozen=True)
class Chart:
    """Values over steps: `curves` pairs a label with a key of metrics.jsonl."""

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
                caption += f"<b>{_short(curve[-1][1])}</b>{note}</span>"
        return f"""<figure><figcaption>{caption}</figcaption>
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{self.title} over steps">
{axes.draw(best)}{svg}<path class="cursor"/></svg></figure>"""

    def _points(self, rows: list[Row], key: str) -> list[Point]:
        values = [(row["step"], row.get(key)) for row in rows]
        return [(step, self.scale * v) for step, v in values if isinstance(v, int | float)]


_LOSS = [("train", "loss"), ("dev", "dev_loss")]
_WIDE = [
    Chart("Loss", "nats per token", _LOSS, zero=False),
    Chart("Loss over log steps", "nats per token", _LOSS, zero=False, log_x=True),
    Chart("Dev word error rate", "percent", [("WER", "dev_wer"), ("CER", "dev_cer")], 100),
    Chart("Shuffled-audio gap", "nats per token", [("dev", "shuffled_audio_gap")]),
]
_SMALL = [
    Chart("Next-token accuracy", "percent", [("dev", "dev_accuracy")], 100),
    Chart("Learning rate", "", [("", "lr")]),
    Chart("Gradient norm", "", [("", "grad_norm")]),
]
_CTC = Chart("CTC loss", "", [("", "ctc")])  # of runs that have one
_SPEED = [
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
            svg += f'<text class="y" x="{_LEFT - 6}" y="{y}" dy=".35em">{_short(value)}</text>'
        steps = (_log_ticks if self.log_x else _ticks)(self.first, self.last)
        for step in filter(float.is_integer, steps):
            x = self.at((step, self.low))[0]
            svg += f'<path class="grid" d="M{x} {_BOTTOM}v4"/>'
            svg += f'<text x="{x}" y="{_HEIGHT - 4}">{_short(step)}</text>'
        if _finite(best) and self.first <= best <= self.last:
            x = self.at((best, self.low))[0]
            svg += f'<path class="best" d="M{x} {_BOTTOM}V{_TOP}"/>'
            svg += f'<text x="{x}" y="{_TOP - 5}">best</text>'
        return svg


def _line(points: list[Point], axes: Axes, style: str) -> str:
    """Few points get dots; many are drawn pale under their running median, a fortieth wide."""
    kept, many = _thin(points, axes), len(points) > 80
    read_out = " ".join(f"{step:.12g},{_short(value)}" for step, value in kept)
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


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: object) -> str:
    """Four digits: 0.0312, 3e-4, 12.5k."""
    if not _finite(value):
        return "–"
    if abs(value) >= 9999.5:
        return f"{value / 1e3:.4g}k" if abs(value) < 9999.5e3 else f"{value / 1e6:.4g}M"
    if 0 < abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}"


def _count(value: object) -> str:
    return f"{value:,.0f}" if _finite(value) else "–"


def _percent(share: object) -> str:
    return f"{round(100 * share, 1):g} %" if _finite(share) else "–"


def _clock(seconds: object) -> str:
    if not _finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2026;--quiet:#5c6570;--line:#e2e5e9;
--s0:#2460c4;--s1:#c9640a;--sub:#fdecb8;--ins:#d5eedd;--del:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e3e6ea;--quiet:#98a2ae;
--line:#2c3238;--s0:#74aaff;--s1:#f0a050;--sub:#55430f;--ins:#1b4a2e;--del:#ff9188}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
h1{font-size:28px;line-height:1.2;letter-spacing:-.01em;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 12px;padding-top:16px;border-top:1px solid var(--line)}
p{margin:0 0 12px}small,.quiet,dt,th,figcaption,article>p{color:var(--quiet);font-size:13px}
.notice{border-left:3px solid var(--s1);padding:2px 0 2px 12px;margin-top:12px}
.figures{display:grid;grid-template-columns:repeat(7,minmax(0,1fr));gap:20px;margin:24px 0 0}
.figures dd{margin:0;font-size:12px;line-height:1.35;color:var(--quiet)}
.figures dt+dd{font-size:24px;line-height:1.4;font-weight:600;color:var(--ink);white-space:nowrap}
.wide,.small{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:24px 32px;
margin-bottom:24px}.small{grid-template-columns:repeat(3,minmax(0,1fr))}
figure{margin:0;break-inside:avoid}figcaption b{color:var(--ink)}
figcaption{display:flex;flex-wrap:wrap;gap:0 10px;margin-bottom:2px}
figcaption span{white-space:nowrap}figcaption span:nth-child(2){flex:1}
.key::before{content:"";display:inline-block;width:14px;height:3px;margin:0 5px 3px 0;
background:var(--s0)}.key.s1::before{background:var(--s1)}
svg{display:block;width:100%;overflow:visible;touch-action:pan-y}
path{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round;
vector-effect:non-scaling-stroke}
text{fill:var(--quiet);font-size:10.5px;text-anchor:middle}.small text{font-size:14px}
text.y{text-anchor:end}.grid{stroke:var(--line);stroke-width:1}
path.s0{stroke:var(--s0)}path.s1{stroke:var(--s1)}.pale{opacity:.3;stroke-width:1}
.dots{stroke-width:6}.best,.cursor{stroke:var(--quiet);stroke-width:1;stroke-dasharray:3 4}
article{display:grid;grid-template-columns:260px 1fr 90px;gap:4px 24px;padding:12px 0;
border-top:1px solid var(--line);break-inside:avoid}
article dl{display:grid;grid-template-columns:76px 1fr;margin:0;gap:2px 8px;
align-content:start;align-items:baseline}
article dd{margin:0}article>p{text-align:right;margin:0}article>p b{color:var(--ink)}
audio{display:block;width:100%;height:36px;margin-top:4px}
mark,ins{background:var(--sub);color:inherit;border-radius:3px;padding:0 2px}
ins{background:var(--ins);text-underline-offset:3px}del{color:var(--del)}
.table{overflow-x:auto}table{border-collapse:collapse;margin-bottom:16px}
th,td{padding:5px 24px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;text-align:left}
th{font-weight:400}th,td{overflow-wrap:break-word}summary{cursor:pointer}
pre{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap}
@media(max-width:900px){.figures{grid-template-columns:repeat(4,minmax(0,1fr))}
.small{grid-template-columns:repeat(2,minmax(0,1fr))}text,.small text{font-size:12px}
article{grid-template-columns:1fr 90px}article>div{grid-column:1/-1}}
@media(max-width:600px){main{padding:20px 16px 40px}.figures{grid-template-columns:1fr 1fr}
.wide,.small{grid-template-columns:minmax(0,1fr)}
article,article dl{grid-template-columns:minmax(0,1fr)}article>p{text-align:left}}
@media print{audio{display:none}body{font-size:12px}main{max-width:none;padding:0}
mark,ins,.key::before{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

# The values under the pointer. Vertices of a path and its data-values correspond one to one.
_SCRIPT = """
for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.parentNode.querySelectorAll("figcaption span:nth-child(2), span b")];
  const before = texts.map(e => e.textContent), cursor = svg.querySelector(".cursor");
  const curves = [...svg.querySelectorAll("[data-values]")].map(path => {
    const values = path.dataset.values.split(" ").map(v => v.split(","));
    const at = path.getAttribute("d").match(/[\\d.]+(?=,)/g);
    return values.map(([step, value], i) => ({x: +at[i], step, value}));
  });
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), size = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) / box.width * size.width;
    const nearest = of => of.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a);
    const near = curves.map(nearest), point = nearest(near);
    [`step ${point.step}`, ...near.map(p => p.value)].forEach((t, i) => texts[i].textContent = t);
    cursor.setAttribute("d", `M${point.x} 16V196`);
  };
  svg.onpointerleave = () => {
    texts.forEach((e, i) => e.textContent = before[i]);
    cursor.removeAttribute("d");
  };
}
"""
