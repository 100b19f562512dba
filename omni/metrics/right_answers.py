"""Shares of right answers: their intervals, their differences, and two questions at a time.

An answer of a closed task is the likeliest choice where choices were scored, else what is written.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

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


def paired_difference(gained: int, lost: int, asked: int) -> dict[str, float] | None:
    """Compare two shares of right answers to the same questions.

    gained, lost: questions that the second system alone, or the first alone, answered rightly.
    Returns difference (second minus first) with its 95 % interval, low and high (Agresti and Min
    2005, section 4: half an answer is added to each cell), and p (McNemar's exact test). None
    without questions.
    """
    from scipy.stats import binomtest, norm

    if not asked:
        return None
    more, less, count = gained + 0.5, lost + 0.5, asked + 2
    middle = (more - less) / count
    width = norm.ppf((1 + _LEVEL) / 2) * math.sqrt(more + less - (more - less) ** 2 / count) / count
    differ = gained + lost
    return {
        "difference": (gained - lost) / asked,
        "low": float(max(-1.0, middle - width)),
        "high": float(min(1.0, middle + width)),
        "p": float(binomtest(gained, differ).pvalue) if differ else 1.0,
    }


def compare_tasks(first: Sequence[Row], second: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Compare the right answers of two systems, task by task, on the questions that both have.

    Tasks whose answer is what is said have none. Returns decided_by, utterances, left_out (those of
    one alone), and the figures of `paired_difference` by task.
    """
    ours, theirs = _by_task(first), _by_task(second)
    found = {}
    for task in (task for task in ours if task in theirs):
        both = [key for key in ours[task] if key in theirs[task]]
        pairs = [(ours[task][key], theirs[task][key]) for key in both]
        by_likelihood = have_scores([row for pair in pairs for row in pair])
        right = [tuple(is_right(row, by_likelihood) for row in pair) for pair in pairs]
        test = paired_difference(right.count((False, True)), right.count((True, False)), len(both))
        if test is not None:
            found[task] = {
                "decided_by": "likelihood" if by_likelihood else "answer",
                "utterances": len(both),
                "left_out": len(ours[task]) + len(theirs[task]) - 2 * len(both),
                **test,
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
    choices were scored, and shuffled_both_right: with another recording for each of the questions.
    A recording that a task asks about more than once is left out, and counted as left_out.
    """
    asked: dict[str, dict[Hashable, list[Row]]] = {}
    for row in rows:
        if "choices" in row and "right" in row:
            of_task = asked.setdefault(row["task"], {})
            of_task.setdefault(recording_of(row), []).append(row)
    found = []
    for one, other in combinations(asked, 2):
        shared = [(asked[one][key], asked[other][key]) for key in asked[one] if key in asked[other]]
        pairs = [(mine[0], others[0]) for mine, others in shared if len(mine) == len(others) == 1]
        if not pairs:
            continue
        right = sum(all(is_right(row, True) for row in pair) for pair in pairs)
        entry: dict[str, Any] = {
            "tasks": [one, other],
            "recordings": len(pairs),
            "left_out": len(shared) - len(pairs),
            "both_right": right / len(pairs),
            "both_right_interval": share_interval(right, len(pairs)),
        }
        if all("shuffled_choices" in row for pair in pairs for row in pair):
            swapped = sum(all(_matches(row, "shuffled_choices") for row in pair) for pair in pairs)
            entry["shuffled_both_right"] = swapped / len(pairs)
        found.append(entry)
    return found
