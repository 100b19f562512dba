"""Shares of right answers: their intervals, their differences, and two questions at a time.

An answer of a closed task is the likeliest choice where choices were scored, else what is written.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from omni.metrics.bootstrap import paired_test

Row = Mapping[str, Any]
_LEVEL = 0.95


def share_interval(right: int, asked: int) -> tuple[float, float] | None:
    """Compute the 95 % interval of a share (Wilson 1927, equation 10); None without questions.

    Unlike a bootstrap, it has a width where all answers are right.
    """
    from scipy.stats import binomtest

    if not asked:
        return None
    found = binomtest(right, asked).proportion_ci(_LEVEL, method="wilson")
    return float(found.low), float(found.high)


def likeliest(log_probs: Mapping[str, float]) -> str:
    """Return the choice with the highest log-probability."""
    return max(log_probs, key=log_probs.__getitem__)


def same(reference: str, hypothesis: str) -> bool:
    """Compare two answers, but for case and white space."""
    return _plain(reference) == _plain(hypothesis)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def is_right(row: Row, by_likelihood: bool) -> bool:
    """Tell whether a row's answer is its label."""
    return _matches(row, "choices") if by_likelihood else bool(row["right"])


def _matches(row: Row, scores: str) -> bool:
    return same(row["reference"], likeliest(row[scores]))


def have_scores(rows: Sequence[Row]) -> bool:
    """Tell whether answers are decided by likelihood: all rows have scores of their choices."""
    return all("choices" in row for row in rows)


def compare_tasks(first: Sequence[Row], second: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Compare the right answers of two systems, task by task, on the questions that both have.

    Tasks whose answer is what is said have none. Returns decided_by, utterances, left_out (those of
    one alone), difference of the shares (second minus first), low, high and p by task.
    """
    ours, theirs = _by_task(first), _by_task(second)
    found = {}
    for task in (task for task in ours if task in theirs):
        both = [key for key in ours[task] if key in theirs[task]]
        if not both:
            continue
        pairs = [(ours[task][key], theirs[task][key]) for key in both]
        by_likelihood = have_scores([row for pair in pairs for row in pair])
        a, b = ([is_right(row, by_likelihood) for row in side] for side in zip(*pairs, strict=True))
        if (test := paired_test(a, b, [1] * len(both))) is not None:
            found[task] = {
                "decided_by": "likelihood" if by_likelihood else "answer",
                "utterances": len(both),
                "left_out": len(ours[task]) + len(theirs[task]) - 2 * len(both),
                **asdict(test),
            }
    return found


def _by_task(rows: Sequence[Row]) -> dict[str, dict[Hashable, Row]]:
    """Sort the rows that are right or wrong by task, recording and label."""
    found: dict[str, dict[Hashable, Row]] = {}
    for row in rows:
        if "right" in row:
            key = row["id"], *recording_of(row), _plain(row["reference"])
            found.setdefault(row["task"], {})[key] = row
    return found


def recording_of(row: Row) -> tuple[Hashable, ...]:
    """Name the recording of a transcript row."""
    return row.get("audio"), row.get("start"), str(row.get("bytes"))


def pairs_of_tasks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Count the recordings of which two questions are both answered rightly.

    Returns tasks, recordings, both_right and its 95 % interval for each two closed tasks whose
    choices were scored, and shuffled_both_right: the same with another recording.
    """
    asked: dict[str, dict[Hashable, Row]] = {}
    for row in rows:
        if "choices" in row and "right" in row:
            asked.setdefault(row["task"], {})[recording_of(row)] = row
    found = []
    for one, other in combinations(asked, 2):
        both = [key for key in asked[one] if key in asked[other]]
        shared = [(asked[one][key], asked[other][key]) for key in both]
        if not shared:
            continue
        right = sum(all(is_right(row, True) for row in pair) for pair in shared)
        entry: dict[str, Any] = {
            "tasks": [one, other],
            "recordings": len(shared),
            "both_right": right / len(shared),
            "both_right_interval": share_interval(right, len(shared)),
        }
        if all("shuffled_choices" in row for pair in shared for row in pair):
            wrong = sum(all(_matches(row, "shuffled_choices") for row in pair) for pair in shared)
            entry["shuffled_both_right"] = wrong / len(shared)
        found.append(entry)
    return found
