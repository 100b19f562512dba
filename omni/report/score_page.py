"""Tables of `omni evaluate`: systems by corpora, differences, groups and the worst utterances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni.report.audio_embed import embed_row
from omni.report.number_text import count, interval, percent
from omni.report.render import render
from omni.report.task_parts import HEAD, confusions, task_rows
from omni.report.task_parts import NOTE as NOTE_OF_TASKS
from omni.report.word_marks import compare_words

_MOST_GROUPS = 20
"""Groups of a table; of more, those with the most words."""
_HEAD = ("checkpoint", "corpus", "utterances", "words", "WER", "95 %", "sub", "ins", "del", "CER")


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Scores:
    """Hold the figures of `omni evaluate`. worst: transcript rows, with checkpoint and corpus."""

    results: list[dict[str, Any]]
    differences: list[dict[str, Any]] = field(default_factory=list)
    task_differences: list[dict[str, Any]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        tasks = {"task_differences": self.task_differences} if self.task_differences else {}
        return {"results": self.results, "differences": self.differences, **tasks}


def tables(scores: Scores) -> list[Table]:
    """Lay out results, differences and groups."""
    found = [
        Table(
            "Error rates",
            _HEAD,
            [_result(result) for result in scores.results],
            "95 %: bootstrap over utterances. sub, ins, del: shares of the references' words.",
        )
    ]
    if scores.differences:
        head = ("corpus", "", "utterances", "of one alone", "WER difference", "95 %", "p")
        rows = [_difference(difference) for difference in scores.differences]
        note = "Paired bootstrap over the utterances that both have; negative: fewer errors."
        found.append(Table("Differences", head, rows, note))
    found += _task_tables(scores)
    names = dict.fromkeys(name for result in scores.results for name in result["groups"])
    for name in names:
        rows = [row for result in scores.results for row in _groups(result, name)]
        columns = ("checkpoint", "corpus", name, "utterances", "words", "WER")
        more = max(len(result["groups"].get(name, {})) for result in scores.results) > _MOST_GROUPS
        note = f"The {_MOST_GROUPS} with the most words." if more else ""
        found.append(Table(f"By {name}", columns, rows, note))
    return found


def _task_tables(scores: Scores) -> Iterator[Table]:
    if rows := [row for result in scores.results for row in _tasks(result)]:
        yield Table("Tasks", ("checkpoint", *HEAD[:-1]), rows, NOTE_OF_TASKS)
    if scores.task_differences:
        yield Table(
            "Differences of tasks",
            ("corpus", "", "task", "utterances", "of one alone", "right answers", "95 %", "p"),
            [_difference(test, test["task"]) for test in scores.task_differences],
            "Of the questions that both have; positive: more right answers. 95 %: Agresti and Min "
            "2005; p: McNemar's exact test.",
        )
    if rows := [row for result in scores.results for row in _pairs(result)]:
        yield Table(
            "Two questions about a recording",
            ("checkpoint", "corpus", "tasks", "recordings", "both right", "95 %", "other audio"),
            rows,
            "Recordings of which both questions are answered rightly.",
        )


def _result(result: Mapping[str, Any]) -> list[str]:
    words = result["words"]
    shares = [result[kind] / words if words else None for kind in _KINDS]
    return [
        result["checkpoint"],
        result["manifest"],
        count(result["utterances"]),
        count(words),
        percent(result["wer"]),
        interval(result["wer_interval"]),
        *map(percent, shares),
        percent(result["cer"]),
    ]


_KINDS = ("substitutions", "insertions", "deletions")


def _difference(found: Mapping[str, Any], *task: str) -> list[str]:
    return [
        found["manifest"],
        f"{found['second']} against {found['first']}",
        *task,
        count(found["utterances"]),
        count(found["left_out"]),
        f"{100 * found['difference']:+.1f}",
        f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}",
        f"{found['p']:.2g}",
    ]


def _pairs(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for pair in result.get("pairs_of_tasks", ()):
        yield [
            result["checkpoint"],
            result["manifest"],
            " and ".join(pair["tasks"]),
            count(pair["recordings"]),
            percent(pair["both_right"]),
            interval(pair["both_right_interval"]),
            percent(pair.get("shuffled_both_right")),
        ]


def _groups(result: Mapping[str, Any], name: str) -> Iterator[list[str]]:
    groups: Mapping[str, Mapping[str, Any]] = result["groups"].get(name, {})
    most = sorted(groups, key=lambda key: -groups[key]["words"])[:_MOST_GROUPS]
    for key in (key for key in groups if key in most):
        rates = groups[key]
        cells = [count(rates["utterances"]), count(rates["words"]), percent(rates["wer"])]
        yield [result["checkpoint"], result["manifest"], key, *cells]


def _tasks(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for row in task_rows(result["manifest"], result.get("tasks"), None):
        yield [result["checkpoint"], *row[:-1]]


def markdown(scores: Scores) -> str:
    """Write the tables in Markdown."""
    parts = []
    for table in tables(scores):
        lines = [f"## {table.title}", "", _line(table.head), _line(["---"] * len(table.head))]
        lines += [_line(row) for row in table.rows]
        parts.append("\n".join([*lines, *(["", table.note] if table.note else [])]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page(scores: Scores) -> str:
    """Write the tables as a page, with the worst utterances to hear."""
    shown = [
        {
            **{name: row[name] for name in ("checkpoint", "corpus", "id", "reference")},
            "audio": embed_row(row),
            "marked": compare_words(row["reference"], row["hypothesis"]),
            "wer": row["wer"],
        }
        for row in scores.worst
    ]
    drawn = [
        figure
        for result in scores.results
        for figure in confusions(
            f"{result['manifest']}, {result['checkpoint']}", result.get("tasks")
        )
    ]
    return render(
        "scores.html", name="Scores", tables=tables(scores), confusions=drawn, worst=shown
    )
