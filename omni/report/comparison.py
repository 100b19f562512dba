"""Compare runs: settings, figures and transcripts that differ.

A figure is marked as the best only where the runs measured the same: on the same data, of finished
runs or at the same step, and, for a loss per token, with the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omni.errors import ConfigError
from omni.metrics.score import normalize
from omni.report.number_text import clock, count, finite, percent, short
from omni.report.run_record import Row, RunRecord, is_run, read_run
from omni.storage.digest import digest
from omni.storage.path import StoragePath
from omni.storage.uri import reason_of

MOST_RUNS = 8  # colours of curves
_LOCATION = ("run.name", "run.storage")
_TEXT = ("data.unicode", "data.case", "data.punctuation", "data.prompt", "data.template")
_DEV, _TEST = ("data.dev", "eval.max_utterances"), ("data.test", "eval.max_utterances")
_DEV_WER = (*_DEV, "eval.wer_utterances")
_LOSS = ("tokenizer.json", *_TEXT)
Better = Literal["low", "high", ""]


@dataclass(frozen=True)
class _Metric:
    """A figure of summary.json. same: settings that must agree for a comparison."""

    label: str
    key: str
    text: Callable[[object], str]
    better: Better = ""
    same: tuple[str, ...] = ()


_FINAL = [
    _Metric("Test WER", "test_wer", percent, "low", _TEST),
    _Metric("Test CER", "test_cer", percent, "low", _TEST),
    _Metric("Dev WER", "dev_wer", percent, "low", _DEV),
    _Metric("Dev CER", "dev_cer", percent, "low", _DEV),
    _Metric("Dev WER, language model alone", "dev_lm_wer", percent, "low", _DEV),
    _Metric("Dev WER, CTC alone", "dev_ctc_wer", percent, "low", _DEV),
    _Metric("Dev loss, nats per token", "dev_loss", short, "low", _DEV + _LOSS),
    _Metric("Dev accuracy", "dev_accuracy", percent, "high", _DEV + _LOSS),
    _Metric("Shuffled-audio gap", "shuffled_audio_gap", short, "high", _DEV + _LOSS),
    _Metric("Train loss", "train_loss", short, "low", ("data.train", *_LOSS)),
    _Metric("Audio seconds per second", "audio_seconds_per_second", short, "high"),
    _Metric("Time spent waiting for data", "data_wait_fraction", percent, "low"),
    _Metric("Training time", "train_seconds", clock, "low", ("optim.steps",)),
    _Metric("Wall time", "wall_seconds", clock, "low", ("optim.steps",)),
    _Metric("Steps", "steps", count),
    _Metric("Best step", "best_step", count),
    _Metric("Epochs", "epochs", short),
    _Metric("Parameters", "parameters", count),
]
_AT_STEP = [
    _Metric("Dev loss", "dev_loss", short, "low", _DEV + _LOSS),
    _Metric("Dev WER", "dev_wer", percent, "low", _DEV_WER),
    _Metric("Dev CER", "dev_cer", percent, "low", _DEV_WER),
    _Metric("Shuffled-audio gap", "shuffled_audio_gap", short, "high", _DEV + _LOSS),
]


@dataclass(frozen=True)
class Figure:
    """A figure of each run, as text.

    best: of each run. differ: settings that keep the values from being compared.
    """

    label: str
    values: list[str]
    best: list[bool]
    differ: str = ""


@dataclass(frozen=True)
class Transcript:
    """Hypothesis of one run for an utterance. wer: None where it was not recorded."""

    hypothesis: str
    wer: float | None
    best: bool = False


@dataclass(frozen=True)
class Utterance:
    """An utterance that the runs transcribe differently. row: of transcripts-SPLIT.jsonl."""

    split: str
    id: str
    reference: str
    row: Row
    transcripts: list[Transcript | None]
    """Of each run; None: it has none of this utterance."""

    @property
    def spread(self) -> tuple[float, float]:
        """Difference of the highest and the lowest WER, and the highest."""
        rates = [t.wer for t in self.transcripts if t is not None and t.wer is not None]
        return (max(rates) - min(rates), max(rates)) if rates else (0.0, 0.0)


@dataclass(frozen=True)
class Agreement:
    """Counts of the utterances of a split that at least two runs transcribed."""

    split: str
    common: int
    same: int
    lowest: list[int]
    """Utterances on which a run alone has the lowest WER."""
    alone: int
    """Utterances that only one run transcribed; they are not compared."""
    notes: list[str]


@dataclass(frozen=True)
class Comparison:
    runs: list[RunRecord]
    names: list[str]
    states: list[str]
    settings: list[tuple[str, list[str]]]
    figures: list[Figure]
    step: int | None
    """Last step at which all runs were evaluated."""
    at_step: list[Figure]
    utterances: list[Utterance]
    """Worst differences first."""
    agreements: list[Agreement]
    notes: list[str]


def compare_runs(paths: Sequence[StoragePath]) -> Comparison:
    """Read and compare runs. Raises ConfigError for a path that is not a run, or too few."""
    _check(paths)
    runs = [read_run(path) for path in paths]
    names = _names(runs)
    differing = _settings(runs)
    tokenizers = [_tokenizer(run) for run in runs]
    differ = {name for name, _ in differing}
    if len(set(tokenizers)) > 1 or None in tokenizers:
        differ.add("tokenizer.json")
    steps = [{row["step"]: row for row in run.evals} for run in runs]
    common = set.intersection(*(set(rows) for rows in steps))
    step = max(common, default=None)
    finished = [run.finished for run in runs]
    final = [_with_own_metrics(run.figures) for run in runs]
    utterances, agreements = [], []
    for split in ("test", "dev"):
        found, agreement = _transcripts(runs, names, split)
        utterances += found
        agreements += [agreement] if agreement.common or agreement.notes else []
    utterances.sort(key=lambda u: u.spread, reverse=True)
    return Comparison(
        runs=runs,
        names=names,
        states=[_state(run) for run in runs],
        settings=differing,
        figures=_figures([*_FINAL, *_own_metrics(final)], final, differ, finished),
        step=step,
        at_step=[]
        if step is None
        else _figures(_AT_STEP, [rows[step] for rows in steps], differ, [True] * len(runs)),
        utterances=utterances,
        agreements=agreements,
        notes=_notes(runs, names),
    )


def _check(paths: Sequence[StoragePath]) -> None:
    if not 2 <= len(paths) <= MOST_RUNS:
        given = f": {', '.join(map(str, paths))}" if len(paths) == 1 else ""
        raise ConfigError(f"RUN: expected 2 to {MOST_RUNS} runs, got {len(paths)}{given}")
    for path in paths:
        try:
            known = is_run(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {reason_of(error)}") from None
        if not known:
            raise ConfigError(
                f"{path}: not a run directory: it holds no config.yaml, metrics.jsonl or "
                "summary.json"
            )
    resolved = [path.resolve() for path in paths]
    twice = next((p for n, p in enumerate(paths) if resolved[n] in resolved[:n]), None)
    if twice is not None:
        raise ConfigError(f"{twice}: this run is named twice")


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Name runs by as many of the last parts of their paths as tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.path) for run in runs]  # the same path in two buckets


def _state(run: RunRecord) -> str:
    if run.finished:
        return "finished"
    if "summary.json" in run.damaged:
        return "summary.json is damaged: values last logged"
    steps, planned = run.figures.get("steps"), run.settings.get("optim.steps")
    return f"not finished: values last logged, at step {count(steps)} of {count(planned)}"


def _notes(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    notes = []
    for run, name in zip(runs, names, strict=True):
        if not run.config_text:
            notes.append(f"{name}: config.yaml is missing; its settings are not compared")
        notes += [f"{name}: {file} is damaged and not shown" for file in run.damaged]
        if run.broken:
            notes.append(f"{name}: unreadable lines of metrics.jsonl left out: {run.broken}")
        if not run.metrics:
            notes.append(f"{name}: metrics.jsonl holds no rows; there are no curves")
    return notes


def _tokenizer(run: RunRecord) -> str | None:
    path = run.path / "tokenizer.json"
    return digest(path.read_bytes()) if path.is_file() else None


# -- settings ----------------------------------------------------------------------------------


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ; a dash where a run's config.yaml lacks one."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    shown = {
        name: ["–" if name not in run.settings else _text(run.settings[name]) for run in runs]
        for name in names
        if name not in _LOCATION
    }
    return [
        (name, values)
        for name, values in shown.items()
        if len({v for v, run in zip(values, runs, strict=True) if run.settings}) > 1
    ]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "[]"
    return str(value)


# -- figures -----------------------------------------------------------------------------------


def not_compared(figures: Sequence[Figure]) -> list[str]:
    """Say which figures are not comparable, and which settings are the reason."""
    by_reason: dict[str, list[str]] = {}
    for figure in figures:
        if figure.differ:
            by_reason.setdefault(figure.differ, []).append(figure.label)
    return [
        f"{', '.join(labels)}: not comparable, for {reason} differs"
        for reason, labels in by_reason.items()
    ]


def _figures(
    metrics: Sequence[_Metric], rows: Sequence[Row], differ: set[str], fair: Sequence[bool]
) -> list[Figure]:
    """Lay out metrics that any run has. fair: runs that may be the best, if at least two may."""
    figures = []
    for metric in metrics:
        values = [row.get(metric.key) for row in rows]
        if not any(map(finite, values)):
            continue
        reasons = [name for name in metric.same if name in differ]
        best = [False] * len(rows)
        if metric.better and not reasons:
            best = _best([v if ok else None for v, ok in zip(values, fair, strict=True)], metric)
        differing = ", ".join(reasons) if metric.better else ""
        figures.append(Figure(metric.label, [metric.text(v) for v in values], best, differing))
    return figures


def _with_own_metrics(figures: Row) -> Row:
    """Add the rates of `eval.metrics` to the figures of a run, as dev_metrics:NAME."""
    found = dict(figures)
    for split in ("dev", "test"):
        rates = figures.get(f"{split}_metrics")
        for name, rate in (rates if isinstance(rates, dict) else {}).items():
            found[f"{split}_metrics:{name}"] = rate
    return found


def _own_metrics(rows: Sequence[Row]) -> list[_Metric]:
    """Lay out these rates; which values are better is not known."""
    keys = dict.fromkeys(key for row in rows for key in row if "_metrics:" in key)
    return [_Metric(key.replace("_metrics:", " ").capitalize(), key, short) for key in keys]


def _best(values: Sequence[object], metric: _Metric) -> list[bool]:
    """Mark the best values; none where fewer than two are known, or all are the same."""
    known = [v for v in values if finite(v)]
    if len(known) < 2 or len(set(known)) == 1:
        return [False] * len(values)
    best = min(known) if metric.better == "low" else max(known)
    return [finite(v) and v == best for v in values]


# -- transcripts -------------------------------------------------------------------------------

_Key = tuple[str, str, int]


def _transcripts(
    runs: Sequence[RunRecord], names: Sequence[str], split: str
) -> tuple[list[Utterance], Agreement]:
    """Match transcripts by id and reference, whatever the case and punctuation of the latter."""
    by_run: list[dict[_Key, Row]] = []
    notes = []
    for run, name in zip(runs, names, strict=True):
        rows = run.transcripts(split)
        if not rows and split == "dev":
            rows = next((r["examples"] for r in reversed(run.evals) if r.get("examples")), [])
            if rows:
                notes.append(f"{name}: only the examples of its last evaluation, without WER")
        by_run.append(_by_key([row for row in rows if isinstance(row, dict)]))
    shared = {key for rows in by_run for key in rows if sum(key in r for r in by_run) > 1}
    everything = {key for rows in by_run for key in rows}
    found, lowest, same = [], [0] * len(runs), 0
    for key in dict.fromkeys(key for rows in by_run for key in rows if key in shared):
        rows_of = [rows.get(key) for rows in by_run]
        utterance = _utterance(split, [row for row in rows_of if row is not None][0], rows_of)
        best = [t is not None and t.best for t in utterance.transcripts]
        if sum(best) == 1:
            lowest[best.index(True)] += 1
        if len({t.hypothesis for t in utterance.transcripts if t is not None}) > 1:
            found.append(utterance)
        else:
            same += 1
    alone = len(everything) - len(shared)
    return found, Agreement(split, len(shared), same, lowest, alone, notes)


def _by_key(rows: Sequence[Row]) -> dict[_Key, Row]:
    """Key rows by id, normalised reference, and their number among those of the same."""
    found: dict[_Key, Row] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        language = row.get("language")
        reference = normalize(
            str(row.get("reference") or ""), language if isinstance(language, str) else "en"
        )
        name = str(row.get("id")), reference
        number = seen[name] = seen.get(name, -1) + 1
        found[name[0], name[1], number] = row
    return found


def _utterance(split: str, first: Row, rows: Sequence[Row | None]) -> Utterance:
    rates = [None if row is None or not finite(row.get("wer")) else row["wer"] for row in rows]
    known = [rate for rate in rates if rate is not None]
    lowest = min(known) if len(set(known)) > 1 else None
    transcripts = [
        None
        if row is None
        else Transcript(str(row.get("hypothesis") or ""), rate, rate is not None and rate == lowest)
        for row, rate in zip(rows, rates, strict=True)
    ]
    reference = str(first.get("reference") or "")
    return Utterance(split, str(first.get("id", "")), reference, first, transcripts)
