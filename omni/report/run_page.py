"""The page of a run: figures, curves and test utterances in one file that needs no network."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import regex

from omni.audio.decode import AudioSpan
from omni.corpus.text import UNSPACED_SCRIPTS
from omni.metrics.run_files import read_events, read_lines
from omni.metrics.throughput import ADVICE
from omni.model.download import ASSETS
from omni.report.audio_embed import player
from omni.report.charts import (
    CTC,
    KL,
    LEARNING_SMALL,
    LEARNING_WIDE,
    SPEED,
    Chart,
    Row,
    bars,
    clock,
    count,
    finite,
    percent,
    short,
)
from omni.storage.path import StoragePath

_TEST_UTTERANCES = 20
_REJECT_EXAMPLES = 5
_EVENTS = 100  # the last ones
_CURVES = 5  # that a chart has colours for
_FAULTS = {"failure", "stalled", "skipped", "recomputed", "checkpoint failed", "damaged checkpoint"}
_S = UNSPACED_SCRIPTS  # written without spaces: a word is a character
_WORD = regex.compile(rf"(?=[{_S}])\X|(?:(?![{_S}])[^\s\-–—])+")


def write_report(run: StoragePath) -> StoragePath:
    """Write `run/report.html` from whatever files the run left behind, and return its path.

    A missing or truncated file never fails it: an interrupted run needs its page the most.
    """
    metrics, broken = _rows(run / "metrics.jsonl")
    train, evals = _by_step(metrics, "train"), _by_step(metrics, "eval")
    summary = _parse(_text(run / "summary.json"))
    figures = _so_far(train, evals) if summary is None else summary
    name = escape((run.resolve() if isinstance(run, Path) else run).name)

    def curves(charts: list[Chart], layout: str) -> str:
        drawn = [chart.draw(train + evals, figures.get("best_step")) for chart in charts]
        return f'<div class="{layout}">{"".join(drawn)}</div>'

    small = LEARNING_SMALL + [CTC] * any(row.get("ctc") for row in train)
    small += [KL] * any(row.get("kl") for row in train) + _by_task(evals)
    small += _by_language(evals)
    style, script = (_text(ASSETS / name) for name in ("report.css", "report.js"))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name} · omni</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{style}</style></head><body><main>
<h1>{name}</h1>{_status(summary, broken)}{_figures(figures)}
<h2>Learning</h2><p class="quiet">Numbers are the last logged. A long curve is drawn pale under its
running median.</p>{curves(LEARNING_WIDE, "wide")}{curves(small, "small")}{_layers(evals)}
{_languages(figures)}<h2>Throughput</h2>{_verdict(figures)}{curves(SPEED, "small")}
{_stages(figures)}{_notes(metrics)}{_faults(run)}<h2>Test utterances</h2>{_test_utterances(run)}
<h2>Last evaluation</h2>{_examples(evals)}
<h2>Rejected utterances</h2>{_rejects(run, figures.get("rejects"))}
<h2>Configuration</h2><details><summary>config.yaml</summary>
<pre>{escape(_text(run / "config.yaml")) or "missing"}</pre></details>
</main><script>{script}</script></body></html>
"""
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# ---- what the run left


def _text(path: StoragePath) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""


def _parse(text: str) -> Row | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _rows(path: StoragePath) -> tuple[list[Row], int]:
    """The objects of a JSON-lines file, and how many lines are broken (a crash cuts one short)."""
    lines = (line.decode(errors="replace") for line in read_lines(path))
    parsed = [_parse(line) for line in lines if line.strip()]
    return [row for row in parsed if row is not None], parsed.count(None)


def _by_step(rows: list[Row], kind: str) -> list[Row]:
    """Rows of a kind by step. A resumed run repeats steps; the last line is the one that counts."""
    last = {r["step"]: r for r in rows if r.get("kind") == kind and finite(r.get("step"))}
    return [last[step] for step in sorted(last)]


def _so_far(train: list[Row], evals: list[Row]) -> Row:
    """What a summary would say by now, for a run that has none: the last values logged."""
    last_train, last_eval = ((rows or [{}])[-1] for rows in (train, evals))
    steps, seconds = (
        max((row[key] for row in (last_train, last_eval) if finite(row.get(key))), default=None)
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
        "parameters": count(summary.get("parameters")),
        "worker" if summary.get("workers") == 1 else "workers": count(summary.get("workers")),
        "of features from the cache": percent(summary.get("cached_fraction")),
    }
    known = [f"{value} {what}" for what, value in facts.items() if value != "–"]
    return f'<p class="quiet">{" · ".join(["Finished", *known])}. {skipped}</p>'


def _by_task(evals: list[Row]) -> list[Chart]:
    """Dev loss of each task, of runs that have several."""
    names = sorted({name for row in evals for name in row.get("dev_tasks") or {}})
    curves = [(escape(name), f"dev_tasks:{name}:loss") for name in names if ":" not in name]
    return [Chart("Dev loss by task", "nats per token", curves)] if curves else []


def _by_language(evals: list[Row]) -> list[Chart]:
    """The headline error rate of each language, of runs that have several."""
    known = [rates for row in evals if (rates := _rates(row.get("dev_languages")))]
    curves = [
        (f"{escape(name)} {_headline(r).upper()}", f"dev_languages:{name}:{_headline(r)}")
        for name, r in (known[-1] if known else {}).items()
        if ":" not in name
    ]
    chart = Chart("Dev error rate by language", "percent", curves[:_CURVES], 100)
    return [chart] if curves else []


def _languages(figures: Row) -> str:
    """Error rates of each split's languages, where there are several."""
    given = figures.get("languages", {"dev": figures.get("dev_languages")})
    rows = [
        (name, split, count(r.get("utterances")), percent(r.get("wer")), percent(r.get("cer")))
        for split, rates in (given if isinstance(given, dict) else {}).items()
        for name, r in _rates(rates).items()
    ]
    if not rows:
        return ""
    note = "Of a language without spaces between words, a word is a character."
    head = ("Language", "Split", "Utterances", "WER", "CER")
    return f'<h2>Languages</h2><p class="quiet">{note}</p>{table(head, sorted(rows))}'


def _rates(given: object) -> dict[str, Row]:
    return (
        {k: v for k, v in given.items() if isinstance(v, dict)} if isinstance(given, dict) else {}
    )


def _headline(rates: Row) -> str:
    return "cer" if rates.get("by") == "cer" else "wer"


def _layers(evals: list[Row]) -> str:
    """What the last evaluation weighed the encoder's layers with, of runs that mix them."""
    mixed = [row["layers"] for row in evals if isinstance(row.get("layers"), dict)]
    weights: Row = mixed[-1] if mixed else {}
    values = {f"layer {name}": w for name, w in weights.items() if finite(w)}
    return f'<div class="small">{bars("Encoder layers", "share", values)}</div>' if values else ""


def _figures(s: Row) -> str:
    wer_short, wer_long = percent(s.get("dev_wer_short")), percent(s.get("dev_wer_long"))
    by_length = ""
    if {wer_short, wer_long} != {"–"}:
        by_length = f"1–2 words {wer_short}, 3 or more {wer_long}"
    wer = by_length or f"CER {percent(s.get('dev_cer'))}"
    loss = f"nats per token; train {short(s.get('train_loss'))}"
    gap = "dev loss with another utterance’s audio, minus dev loss; near 0, audio is ignored"
    tiles = [
        ("Dev WER", percent(s.get("dev_wer")), wer),
        ("Test WER", percent(s.get("test_wer")), f"CER {percent(s.get('test_cer'))}"),
        ("Dev loss", short(s.get("dev_loss")), loss),
        ("Shuffled-audio gap", short(s.get("shuffled_audio_gap")), gap),
        ("Audio s/s", short(s.get("audio_seconds_per_second")), "seconds of audio per second"),
        ("Wall time", clock(s.get("wall_seconds")), "h:min:s"),
        ("Steps", count(s.get("steps")), f"best {count(s.get('best_step'))}"),
    ]
    cells = [
        f"<div><dt>{label}</dt><dd>{value}</dd><dd>{'' if note.endswith('–') else note}</dd></div>"
        for label, value, note in tiles
    ]
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _verdict(figures: Row) -> str:
    """What limits the run, and what would change it; of an unfinished one, the last log line's."""
    limit = str(figures.get("throughput_limit", figures.get("limit")))
    if limit not in ADVICE:
        return ""
    said = figures.get("throughput_verdict", f"{limit}-bound at the last log line")
    return f"<p><b>{escape(str(said))}.</b> What would change it: {escape(ADVICE[limit])}.</p>"


def _stages(figures: Row) -> str:
    encoder, trainer = "encoder_audio_seconds_per_second", "audio_seconds_per_second"
    rows = [
        ("Encoder", short(figures.get(encoder)), ""),
        ("Trainer", short(figures.get(trainer)), percent(figures.get("data_wait_fraction"))),
    ]
    return table(("Stage", "Audio seconds per second", "Time spent waiting for data"), rows)


def _test_utterances(run: StoragePath) -> str:
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
    return f'<p class="quiet">Dev utterances at step {count(last["step"])}.</p>{"".join(shown)}'


def _audio(row: Row) -> str:
    try:
        span = AudioSpan(float(row.get("start") or 0), row.get("duration"))
    except (TypeError, ValueError):
        span = AudioSpan()
    return player(str(row.get("audio") or ""), span)


def _utterance(row: Row, audio: str) -> str:
    reference, hypothesis = (str(row.get(key) or "") for key in ("reference", "hypothesis"))
    wer = f"<p><b>{percent(row['wer'])}</b> WER</p>" if "wer" in row else ""
    return f"""<article><div><small>{escape(str(row.get("id", "")))}</small>{audio}</div>
<dl><dt>reference</dt><dd>{escape(reference)}</dd>
<dt>hypothesis</dt><dd>{_marked(reference, hypothesis)}</dd></dl>{wer}</article>"""


def _notes(metrics: list[Row]) -> str:
    """What the run had to say: how encoders were chosen, that the cache is full."""
    texts = [str(row.get("text", "")) for row in metrics if row.get("kind") == "note"]
    return "".join(f'<p class="quiet">{escape(text)}</p>' for text in dict.fromkeys(texts) if text)


def _faults(run: StoragePath) -> str:
    """What befell the run, where anything did: attempts, restarts, skipped steps."""
    events = read_events(run)
    if sum(event.get("event") == "attempt" for event in events) < 2 and not any(
        event.get("event") in _FAULTS for event in events
    ):
        return ""
    rows = [
        (
            _moment(event.get("time")),
            count(event.get("step")),
            str(event.get("event")),
            str(event.get("reason") or event.get("why") or _workers(event)),
        )
        for event in events
    ]
    shown = table(("Time (UTC)", "Step", "Event", "Detail"), rows[-_EVENTS:])
    return f"<h2>Attempts and faults</h2>{shown}"


def _moment(seconds: object) -> str:
    if not finite(seconds):
        return "–"
    return datetime.fromtimestamp(float(str(seconds)), timezone.utc).strftime("%m-%d %H:%M:%S")


def _workers(event: Row) -> str:
    workers = event.get("workers")
    found = {
        "worker" if workers == 1 else "workers": workers,
        "steps done again": event.get("redone"),
    }
    return ", ".join(f"{value} {what}" for what, value in found.items() if value)


def _rejects(run: StoragePath, counted: object) -> str:
    rows, _ = _rows(run / "rejects.jsonl")
    reasons = Counter(str(row.get("reason")) for row in rows)
    if not rows and counted:  # the file was lost on the way, the count was not
        reasons.update(counted if isinstance(counted, dict) else {"not recorded": counted})
    if not reasons.total():
        return '<p class="quiet">No utterance was rejected.</p>'
    keys = "id", "reason", "detail", "uri"
    examples = [[str(row.get(key) or "") for key in keys] for row in rows[:_REJECT_EXAMPLES]]
    counts = table(("Reason", "Count"), [(k, count(n)) for k, n in reasons.most_common()])
    return counts + (table(("Example", "Reason", "Detail", "URI"), examples) if examples else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
