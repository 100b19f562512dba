"""Page of a run: results, curves and test utterances in one file without outside references."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from typing import Any

from omni.metrics.listening import listening_note
from omni.metrics.run_files import read_events
from omni.metrics.throughput import ADVICE
from omni.report.audio_embed import Audio, embed_row
from omni.report.charts import (
    CTC,
    DECODERS,
    KL,
    LEARNING_SMALL,
    LEARNING_WIDE,
    SPEED,
    Chart,
    Figure,
    Row,
)
from omni.report.number_text import clock, count, finite, percent, short
from omni.report.render import render
from omni.report.run_record import read_rows, read_run
from omni.report.task_parts import (
    HEAD,
    NOTE,
    choice_shares,
    claims,
    confusions,
    metric_text,
    task_rows,
)
from omni.report.word_marks import compare_words
from omni.storage.path import StoragePath

_TEST_UTTERANCES = 20
_REJECT_EXAMPLES = 5
_EVENTS = 100  # the newest
_CURVES = 5  # colours of a chart
_QUIET = {"setting", "started"}  # Listed elsewhere, or told by the attempt.
_FAULTS = {"failure", "stalled", "skipped", "recomputed", "checkpoint failed", "damaged checkpoint"}


def write_report(run: StoragePath) -> StoragePath:
    """Write `run/report.html` from the files of the run, and return its path.

    Missing and truncated files are passed over: an interrupted run needs its page the most.
    """
    record = read_run(run)
    train, evals, figures = record.train, record.evals, record.figures
    small = LEARNING_SMALL + [CTC] * any(row.get("ctc") for row in train)
    small += [KL] * any(row.get("kl") for row in train) + _by_task(evals) + _by_language(evals)
    small += (
        _task_metrics(evals)
        + _by_metric(evals)
        + [DECODERS] * any(row.get("dev_ctc_wer") for row in evals)
    )
    drawn = {
        name: [chart.draw(train + evals, figures.get("best_step")) for chart in charts]
        for name, charts in (
            ("learning_wide", LEARNING_WIDE),
            ("learning_small", small),
            ("speed", SPEED),
        )
    }
    limit = str(figures.get("throughput_limit", figures.get("limit")))
    transcripts = record.transcripts("test")
    shown: Row = next((row for row in reversed(evals) if row.get("examples")), {"examples": []})
    rejects, _ = read_rows(run / "rejects.jsonl")
    events = read_events(run)
    page = render(
        "run.html",
        name=run.resolve().name,
        s=figures,
        finished=record.finished,
        broken=record.broken,
        facts=_facts(figures),
        tiles=_tiles(figures),
        layers=_layers(evals),
        languages=_languages(figures),
        tasks=_tasks(figures),
        task_head=HEAD,
        task_note=NOTE,
        confusions=_confusions(figures),
        verdict=limit in ADVICE
        and figures.get("throughput_verdict", f"{limit}-bound at the last log line"),
        advice=ADVICE.get(limit),
        listening=listening_note(figures),
        notes=record.notes,
        changes=_changed_settings(events),
        events=_faults(events),
        test=[_utterance(row, embed_row(row)) for row in transcripts[:_TEST_UTTERANCES]],
        test_total=len(transcripts),
        examples=[
            _utterance(row, embed_row(row) if row.get("audio") else None)
            for row in shown["examples"]
        ],
        examples_step=shown.get("step"),
        rejects=_reject_counts(rejects, figures.get("rejects")),
        reject_examples=[
            [str(row.get(key) or "") for key in ("id", "reason", "detail", "uri")]
            for row in rejects[:_REJECT_EXAMPLES]
        ],
        config=record.config_text,
        **drawn,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# -- sections ----------------------------------------------------------------------------------


def _facts(s: Row) -> list[str]:
    facts = {
        "parameters": count(s.get("parameters")),
        "worker" if s.get("workers") == 1 else "workers": count(s.get("workers")),
        "of features from the cache": percent(s.get("cached_fraction")),
        "dev transcripts by decoder": _decoders(s.get("dev_decoders")),
        "dev transcripts cut at eval.max_new_tokens": count(s.get("dev_cut") or None),
        "test transcripts cut at eval.max_new_tokens": count(s.get("test_cut") or None),
    }
    return [f"{value} {what}" for what, value in facts.items() if value != "–"]


def _decoders(counts: object) -> str:
    """Write how many transcripts each decoder wrote, e.g. `50 joint, 5 lm`."""
    given = counts if isinstance(counts, dict) else {}
    return ", ".join(f"{count(n)} {name}" for name, n in given.items()) or "–"


def _tiles(s: Row) -> list[tuple[str, str, str]]:
    wer_short, wer_long = percent(s.get("dev_wer_short")), percent(s.get("dev_wer_long"))
    wer = f"CER {percent(s.get('dev_cer'))}"
    if {wer_short, wer_long} != {"–"}:
        wer = f"1–2 words {wer_short}, 3 or more {wer_long}"
    test = f"CER {percent(s.get('test_cer'))}"
    gap = "dev loss with another utterance’s audio, minus dev loss; near 0, audio is ignored"
    tiles = [
        ("Dev WER", percent(s.get("dev_wer")), _known(wer, *_alone(s, "dev"))),
        ("Test WER", percent(s.get("test_wer")), _known(test, *_alone(s, "test"))),
        (
            "Dev loss",
            short(s.get("dev_loss")),
            f"nats per token; train {short(s.get('train_loss'))}",
        ),
        ("Shuffled-audio gap", short(s.get("shuffled_audio_gap")), gap),
        ("Audio s/s", short(s.get("audio_seconds_per_second")), "seconds of audio per second"),
        ("Wall time", clock(s.get("wall_seconds")), "h:min:s"),
        ("Steps", count(s.get("steps")), f"best {count(s.get('best_step'))}"),
    ]
    return [(label, value, "" if note.endswith("–") else note) for label, value, note in tiles]


def _alone(s: Row, split: str) -> list[str]:
    """Write the WER of each decoder alone, of a run with a CTC head."""
    names = {"language model alone": f"{split}_lm_wer", "CTC alone": f"{split}_ctc_wer"}
    return [f"{what} {percent(s.get(key))}" for what, key in names.items()]


def _known(*texts: str) -> str:
    """Join the texts that have a value."""
    return "; ".join(text for text in texts if not text.endswith("–"))


def _by_task(evals: list[Row]) -> list[Chart]:
    """Chart the dev loss of each task, if there are several."""
    names = sorted({name for row in evals for name in row.get("dev_tasks") or {}})
    curves = [(name, f"dev_tasks:{name}:loss") for name in names if ":" not in name]
    return [Chart("Dev loss by task", "nats per token", curves)] if curves else []


def _task_metrics(evals: list[Row]) -> list[Chart]:
    """Chart the figure that sums up each task, but those of 100."""
    found = [scores for row in evals if isinstance(scores := row.get("dev_scores"), dict)]
    scores = found[-1] if found else {}
    curves = [
        (f"{name} {metric_text(f.get('metric'), None).removesuffix(' –')}",
         f"dev_task_metrics:{name}")
        for name, f in scores.items()
        if isinstance(f, dict) and f.get("metric") not in ("bleu", "chrf") and ":" not in name
    ]  # fmt: skip
    return [Chart("Dev metric by task", "percent", curves[:_CURVES], 100)] if curves else []


def _tasks(figures: Row) -> list[tuple[str, ...]]:
    return [
        tuple(cell.replace(" %", "\u00a0%") for cell in row)
        for split in ("dev", "test")
        for row in task_rows(
            split,
            figures.get(f"{split}_scores"),
            figures.get("dev_tasks") if split == "dev" else None,
        )
    ]


def _confusions(figures: Row) -> list[Figure]:
    drawn = (confusions(split, figures.get(f"{split}_scores")) for split in ("dev", "test"))
    return [figure for of_split in drawn for figure in of_split]


def _by_metric(evals: list[Row]) -> list[Chart]:
    """Chart the rates of the run's own metrics."""
    names = sorted({name for row in evals for name in row.get("dev_metrics") or {}})
    curves = [(name, f"dev_metrics:{name}") for name in names if ":" not in name]
    return [Chart("Metrics of its own", "", curves[:_CURVES])] if curves else []


def _by_language(evals: list[Row]) -> list[Chart]:
    """Chart the error rate to quote of each language, if there are several."""
    known = [rates for row in evals if (rates := _rates(row.get("dev_languages")))]
    curves = [
        (f"{name} {_quoted(r).upper()}", f"dev_languages:{name}:{_quoted(r)}")
        for name, r in (known[-1] if known else {}).items()
        if ":" not in name
    ]
    chart = Chart("Dev error rate by language", "percent", curves[:_CURVES], 100)
    return [chart] if curves else []


def _languages(figures: Row) -> list[tuple[str, ...]]:
    given = figures.get("languages", {"dev": figures.get("dev_languages")})
    return sorted(
        (name, split, count(r.get("utterances")), percent(r.get("wer")), percent(r.get("cer")))
        for split, rates in (given if isinstance(given, dict) else {}).items()
        for name, r in _rates(rates).items()
    )


def _rates(given: object) -> dict[str, Row]:
    rates = given if isinstance(given, dict) else {}
    return {name: r for name, r in rates.items() if isinstance(r, dict)}


def _quoted(rates: Row) -> str:
    return "cer" if rates.get("by") == "cer" else "wer"


def _layers(evals: list[Row]) -> dict[str, float]:
    """Return the last weights of the encoder's layers, of a run that mixes them."""
    mixed = [row["layers"] for row in evals if isinstance(row.get("layers"), dict)]
    weights: Row = mixed[-1] if mixed else {}
    return {f"layer {name}": w for name, w in weights.items() if finite(w)}


def _utterance(row: Row, audio: Audio | None = None) -> dict[str, Any]:
    reference, hypothesis = (str(row.get(key) or "") for key in ("reference", "hypothesis"))
    return {
        "id": row.get("id", ""),
        "audio": audio,
        "reference": reference,
        "words": compare_words(reference, hypothesis),
        "task": row.get("task"),
        "claims": claims(row),
        "choices": choice_shares(row),
        "right": row.get("right"),
        "has_wer": "wer" in row,
        "wer": row.get("wer"),
        "cut": row.get("cut") is True,
    }


def _changed_settings(events: list[Row]) -> list[tuple[str, ...]]:
    """Return the settings that were changed when the run was continued."""
    return [
        (
            _moment(event.get("time")),
            count(event.get("step")),
            *(str(event.get(key)) for key in ("name", "before", "after")),
        )
        for event in events
        if event.get("event") == "setting"
    ]


def _faults(events: list[Row]) -> list[tuple[str, ...]]:
    """Return the newest events; none of a run of one attempt without faults."""
    events = [event for event in events if event.get("event") not in _QUIET]
    attempts = sum(event.get("event") == "attempt" for event in events)
    if attempts < 2 and not any(event.get("event") in _FAULTS for event in events):
        return []
    return [
        (
            _moment(event.get("time")),
            count(event.get("step")),
            str(event.get("event")),
            str(event.get("reason") or event.get("why") or _workers(event)),
        )
        for event in events[-_EVENTS:]
    ]


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
    texts = [f"{value} {what}" for what, value in found.items() if value]
    return ", ".join([*texts, *["no encoders"] * (event.get("encoders") == 0)])


def _reject_counts(rows: list[Row], counted: object) -> list[tuple[str, str]]:
    """counted: of the summary, for a run whose rejects.jsonl is lost."""
    reasons = Counter(str(row.get("reason")) for row in rows)
    if not rows and counted:
        given = counted if isinstance(counted, dict) else {"not recorded": counted}
        reasons.update({reason: n for reason, n in given.items() if finite(n)})
    return [(reason, count(n)) for reason, n in reasons.most_common()] if reasons.total() else []
