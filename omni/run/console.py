"""Show a run in the terminal, from the rows of its metrics.jsonl and events.jsonl."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni.checkpoint.train_state import TrainState
from omni.corpus.index_row import DEFAULT_TASK
from omni.errors import counted, printable
from omni.metrics.listening import listening_note
from omni.report.task_parts import metric_text, task_line
from omni.run.prepare import Prepared
from omni.storage.path import StoragePath


class LiveView:
    """Printer of the rows that a `Follower` reads.

    Text of rows and errors is never read as markup, and its control characters show as escapes.
    """

    seen = sys.maxsize
    """Rows that were shown before: all that an earlier driver wrote."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._resumed_seconds = 0.0
        self._resumed_step = 0

    def header(self, prepared: Prepared, state: TrainState | None) -> None:
        config = prepared.config
        self._print(("omni", "bold"), f" {config.run_dir}")
        for name, split in prepared.splits.items():
            self.show(f"  {name:<6} {counted(split.rows, 'utterance')}, {split.hours:.2f} h")
        train = prepared.splits["train"]
        plan = train.plan
        self.show(
            f"  plan   {counted(config.optim.steps, 'step')} of {config.optim.bins_per_step} x "
            f"{config.optim.bin_positions} positions, {prepared.filled:.1%} filled, "
            f"{plan.epoch(plan.bins):.1f} epochs"
        )
        if train.reader is not None:
            self.show(
                f"         in {counted(train.reader.windows.per_epoch, 'window')} per epoch, of "
                f"which the first is {prepared.filled:.2%} filled"
            )
        if prepared.rejects:
            first = prepared.rejects[0]
            left_out = f"{counted(len(prepared.rejects), 'row')} left out"
            self._print(
                "  ",
                (left_out, "yellow"),
                f" (rejects.jsonl); the first, {first.id}: {first.reason}",
            )
        for note in prepared.notes:
            self.warn(note)
        if state is not None:
            self._resumed_step, self._resumed_seconds = state.step, state.seconds
            self.show(f"  continuing from step {state.step}")

    def show(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print("  ", ("note", "yellow"), f" {_one_line(text)}")

    def changed(self, text: str) -> None:
        """Show that something differs from the run that is continued."""
        self._print("  ", ("changed", "yellow"), f" {_one_line(text)}")

    def complete(self, run_dir: StoragePath) -> None:
        self.show(f"  complete; remove {run_dir} to train it again")

    def footer(self, summary: dict[str, Any], report: StoragePath) -> None:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name in (
            "steps",
            "best_step",
            "train_loss",
            "dev_loss",
            "shuffled_audio_gap",
            "dev_wer",
            "dev_lm_wer",
            "dev_ctc_wer",
            "test_wer",
            "test_lm_wer",
            "test_ctc_wer",
            "audio_seconds_per_second",
            "data_wait_fraction",
            "wall_seconds",
            "rejects",
        ):
            if name not in summary and name.endswith(("_lm_wer", "_ctc_wer")):
                continue  # The run has no CTC head.
            value = summary.get(name)
            table.add_row(name, _text(f"{value:.4g}" if isinstance(value, float) else str(value)))
        for name in ("dev_cut", "test_cut"):
            if cut := summary.get(name):
                table.add_row(name, f"{cut} (eval.max_new_tokens)")
        for split in ("dev", "test"):
            for task, figures in summary.get(f"{split}_scores", {}).items():
                table.add_row(f"{split} {task}", _text(task_line(figures)))
        for split, rates in summary.get("languages", {}).items():
            table.add_row(f"{split} by language", _text(_by_language(rates).strip(" ()")))
        self._console.print(table)
        if (note := listening_note(summary)) is not None:
            self.warn(note)
        self.show(f"report: {report}")

    def rewound(self, rows: int, step: int) -> None:
        """Do nothing: the attempt event already reports it."""

    def rows(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._print(*_row(row, self._resumed_step, self._resumed_seconds))
            for example in row.get("examples", []):
                for name in ("reference", "hypothesis"):
                    cut = name == "hypothesis" and example.get("cut")
                    self._print(
                        "         ",
                        (f"{name:<10}", "dim"),
                        f" {_one_line(example[name])}",
                        (" (cut)" if cut else "", "yellow"),
                    )

    def events(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            if (text := describe_event(event)) is not None:
                self._print(f"{event['step'] or 0:>7} ", (text, "yellow"))
            for line in describe_groups(event):
                self._print(f"{'':>7} ", (line, "dim"))

    def _print(self, *parts: _Part) -> None:
        """Print a line of plain texts and (text, style)."""
        self._console.print(Text.assemble(*(_safe(part) for part in parts)))


_Part = str | tuple[str, str]


def _safe(part: _Part) -> _Part:
    return printable(part) if isinstance(part, str) else (printable(part[0]), part[1])


def _text(text: str) -> Text:
    return Text(printable(text))


def _row(row: dict[str, Any], resumed_step: int, resumed_seconds: float) -> list[_Part]:
    """Return the line of a row of metrics.jsonl."""
    if row["kind"] == "note":
        return [f"{row['step']:>7} ", ("note", "yellow"), f" {row['text']}"]
    if row["kind"] == "eval":
        wer = "-" if row["dev_wer"] is None else f"{row['dev_wer']:.1%}"
        ctc = f"ctc {row['dev_ctc']:.3f}  " if "dev_ctc" in row else ""
        gap = "-" if (found := row.get("shuffled_audio_gap")) is None else f"{found:.2f}"
        return [
            (f"{row['step']:>7}", "bold"),
            f" dev loss {row['dev_loss']:.3f}  {ctc}next token {row['dev_accuracy']:.1%}  "
            f"shuffled-audio gap {gap}  ",
            (f"WER {wer}", "bold"),
            _alone(row),
            # Rows of older versions do not count cut transcripts.
            f" ({cut} cut)" if (cut := row.get("dev_cut")) else "",
            _by_language(row.get("dev_languages", {})),
            _by_task(row.get("dev_scores", {})),
        ]
    done, total = row["step"], row["steps"]
    pace = (row["seconds"] - resumed_seconds) / max(1, done - resumed_step)
    # Steps that train with CTC alone do not run the language model.
    ctc_only = row["loss"] is None
    loss = f"ctc {row['ctc']:.3f}" if ctc_only else f"loss {row['loss']:.3f}"
    return [
        f"{done:>7}/{total} {loss}  lr {row['lr']:.1e}  "
        f"grad {row['grad_norm']:.2f}  {row['audio_seconds_per_second']:.0f} audio-s/s  "
        f"{row['tokens_per_second']:.0f} tok/s  wait {row['data_wait_fraction']:.0%} "
        f"({_limit(row['limit'])})  ETA {_clock(pace * (total - done))}"
    ]


def _by_task(scores: dict[str, dict[str, Any]]) -> str:
    """Return the figure that sums up each task, but the WER of transcripts, which the line has."""
    shown = {name: f for name, f in scores.items() if name != DEFAULT_TASK}
    parts = [f"{name} {metric_text(f['metric'], f['value'])}" for name, f in shown.items()]
    return f"  [{', '.join(parts)}]" if parts else ""


def describe_event(event: dict[str, Any]) -> str | None:
    """Describe an event in one line; None for an event that others already report."""
    kind, reason = event["event"], str(event.get("reason", ""))
    if kind == "attempt":
        workers = int(event.get("workers") or 0)
        start = f"continuing from step {event['step']}" if event.get("step") else "starting"
        cached = "; no encoders: the cache holds all features" if event.get("encoders") == 0 else ""
        return f"{start} with {counted(workers, 'worker')}{cached}"
    titles = {
        "failure": "an attempt failed",
        "slow": "no progress so far",
        "stalled": "no progress",
        "no room": "the workers did not start, trying again",
        "moving": "stopping the workers, to continue elsewhere",
        "recomputed": "recomputing the step",
        "skipped": "no update in this step",
        "checkpoint failed": "checkpoint not written, training continues",
        "damaged checkpoint": "skipping a damaged checkpoint",
        "best": "the best checkpoint is chosen anew",
        "prepared again": "preparing the training data again",
        "override": "continuing with other fingerprints",
    }
    return f"{titles[kind]}: {reason or event.get('fields')}" if kind in titles else None


def _limit(limit: str) -> str:
    return "waiting for the first blocks" if limit == "start" else f"{limit}-bound"


def describe_groups(event: dict[str, Any]) -> list[str]:
    """Describe the optimizer's groups of an attempt, a line for each."""
    return [
        f"{group['role']:<11} {group['parameters']:>13,} parameters, {group['optimizer']:<5} "
        f"lr {group['lr']:.1e}, weight decay {group['weight_decay']:.2g}"
        + (f", from step {group['first_step'] + 1}" if group["first_step"] else "")
        for group in event.get("groups", [])
    ]


def _alone(row: dict[str, Any]) -> str:
    """Format the WER of each decoder alone, e.g. ` (LM 66.5%, CTC 52.6%)`."""
    shown = [
        f"{name.upper()} {wer:.1%}"
        for name in ("lm", "ctc")
        if (wer := row.get(f"dev_{name}_wer")) is not None
    ]
    return f" ({', '.join(shown)})" if shown else ""


def _by_language(rates: dict[str, dict[str, Any]]) -> str:
    """Format the error rate of each language, e.g. `(fr 41.0%, zh CER 20.2%)`."""
    shown = [
        f"{name} {'CER ' if r['by'] == 'cer' else ''}{r[r['by']]:.1%}"
        for name, r in rates.items()
        if r[r["by"]] is not None
    ]
    return f"  ({', '.join(shown)})" if shown else ""


def _one_line(text: str) -> str:
    """Join lines: an untrained model may write pages."""
    return " ".join(text.split())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
