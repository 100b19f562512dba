"""Figures of transcript rows: error rates with intervals, by group, and differences of systems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from omni.corpus.index_row import DEFAULT_TASK
from omni.inference.decode_batch import by_language, count_cut, count_decoders, wer_alone
from omni.inference.decode_batch import summarize as sum_errors
from omni.metrics.bootstrap import paired_test, rate_interval
from omni.metrics.right_answers import recording_of
from omni.metrics.score import Errors, total, units
from omni.metrics.task_scores import spoken
from omni.metrics.text_metric import TextMetric, score

Row = dict[str, Any]
_LENGTHS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, None))
"""Words of a reference, first and last, of the groups by length."""
GROUPS = ("length", "language", "speaker", "task")


def summarize(rows: list[Row], metrics: Sequence[TextMetric] = ()) -> dict[str, Any]:
    """Compute the figures of one system on one corpus.

    rows: transcript rows with counts of edits. Error rates and `utterances` are of those whose
    answer is what is said; decoders, cut and in_pieces of all. wer_interval: 95 % over utterances,
    None for fewer than two.
    """
    said = spoken(rows)
    errors = sum_errors(said)
    every = errors["all"]
    return {
        "utterances": len(said),
        "wer": every.wer,
        "wer_interval": _interval(said),
        "wer_short": errors["short"].wer,
        "wer_long": errors["long"].wer,
        "cer": every.cer,
        "words": every.words,
        "word_errors": every.word_errors,
        "substitutions": every.substitutions,
        "insertions": every.insertions,
        "deletions": every.deletions,
        **{f"{decoder}_wer": wer for decoder, wer in wer_alone(rows).items()},
        "decoders": count_decoders(rows),
        **({"languages": languages} if (languages := by_language(said)) else {}),
        "groups": groups(said),
        **({"metrics": score(said, metrics)} if metrics else {}),
        "cut": count_cut(rows),
        "in_pieces": sum("pieces" in row for row in rows),
    }


def groups(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the WER by length of the reference, language, speaker and task.

    A column with one value for all rows has no groups.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in GROUPS:
        members: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            value = _length_of(row) if name == "length" else row.get(name)
            if name == "task":
                value = value or DEFAULT_TASK
            if value is not None:
                members[value].append(row)
        if len(members) > 1:
            found[name] = {
                key: _rates([row["errors"] for row in members[key]])
                for key in sorted(members, key=_order if name == "length" else None)
            }
    return found


def _order(length: str) -> int:
    return int(length.partition(" ")[0])


def _length_of(row: Row) -> str | None:
    words = len(units(row["reference"], row["language"]))
    for first, last in _LENGTHS:
        if words >= first and (last is None or words <= last):
            return f"{first} or more words" if last is None else f"{first} to {last} words"
    return None


def _rates(errors: Sequence[Errors]) -> dict[str, Any]:
    every = total(errors)
    return {"utterances": len(errors), "words": every.words, "wer": every.wer}


def _interval(rows: Sequence[Row]) -> tuple[float, float] | None:
    errors = [row["errors"] for row in rows]
    return rate_interval([e.word_errors for e in errors], [e.words for e in errors])


def compare(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any] | None:
    """Compare the WER of two systems on the utterances that both have transcribed.

    Rows belong together by id and recording: checkpoints may write in another case, and references
    follow them. Returns utterances, left_out (those of one alone), difference (second minus first),
    low, high and p; None where there is nothing to compare.
    """
    ours, theirs = ({_key(row): row["errors"] for row in rows} for rows in (first, second))
    # Words are counted after the normaliser, so that they are the same for both.
    both = [key for key in ours if key in theirs and ours[key].words == theirs[key].words]
    test = paired_test(
        [ours[key].word_errors for key in both],
        [theirs[key].word_errors for key in both],
        [ours[key].words for key in both],
    )
    if test is None:
        return None
    left_out = len(ours) + len(theirs) - 2 * len(both)
    return {"utterances": len(both), "left_out": left_out, **asdict(test)}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["id"], *recording_of(row)


def worst(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the rows with the most word errors, those of higher WER first among equals."""

    def rank(row: Mapping[str, Any]) -> tuple[int, float]:
        errors: Errors = row["errors"]
        return errors.word_errors, errors.wer or 0.0

    wrong = [row for row in rows if row["errors"].word_errors]
    return sorted(wrong, key=rank, reverse=True)[:count]
