"""Turn the measures of a corpus into labels of its utterances: values, and classes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omni.corpus.index_row import DEFAULT_TASK
from omni.texture.classes import Classes, terciles

Measure = Literal["pitch", "rate", "energy", "pauses"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Within = Literal["corpus", "language", "speaker"]
Bounds: TypeAlias = Mapping[str, Sequence[float]]
"""Values at which the classes of a corpus, or of each language or speaker in it, end."""
_CLASSES = {
    "pitch": "pitch_class",
    "rate": "rate_class",
    "energy": "energy_class",
    "pauses": "pause_class",
}
# Of each measure, its values and their decimals; the first one is what the classes are made of.
_VALUES: dict[Measure, dict[str, int]] = {
    "pitch": {"pitch_hz": 1, "pitch_semitones": 2, "voiced_share": 3},
    "rate": {"characters_per_second": 2},
    "energy": {"energy_db": 2},
    "pauses": {"pauses": 0, "pause_seconds": 3},
}
PAUSES = ("none", "one", "several")


def names_of(measures: tuple[Measure, ...]) -> list[str]:
    """Return the names of the labels that the measures give."""
    return [name for m in measures for name in (*_VALUES[m], _CLASSES[m])]


def text_columns(part: pa.Table) -> pa.Table:
    """Return what labels need of the rows of a part of an index, beside their measures.

    letters: in the transcript; null: none is known. digits: it has some.
    """
    transcribed = pc.and_(
        pc.is_null(part["messages"]),
        pc.equal(pc.fill_null(part["task"], DEFAULT_TASK), DEFAULT_TASK),
    )
    known = pc.and_(transcribed, pc.not_equal(part["text"], ""))
    letters = pc.count_substring_regex(part["text"], r"\pL")
    return pa.table(
        {
            "letters": pc.if_else(known, letters, pa.scalar(None, letters.type)),
            "digits": pc.match_substring_regex(part["text"], r"\pN"),
            "speaker": part["speaker"],
            "language": part["language"],
        }
    )


@dataclass(frozen=True)
class Labels:
    """Labels of the rows of a corpus.

    summary: of each measure, counts of utterances, of missing ones by reason, classes and bounds.
    """

    values: dict[str, np.ndarray]
    """(n,) float64 of each value, rounded; nan: none."""
    classes: dict[str, list[str | None]]
    summary: dict[str, Any]

    def of_row(self, row: int) -> dict[str, Any]:
        """Return the labels of a row, without those that it lacks."""
        found: dict[str, Any] = {}
        for name, column in self.values.items():
            if not np.isnan(column[row]):
                value = float(column[row])
                found[name] = int(value) if name == "pauses" else value
        for name, classes in self.classes.items():
            if classes[row] is not None:
                found[name] = classes[row]
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Count the rows that have each label."""
        counts = {name: int((~np.isnan(column)).sum()) for name, column in self.values.items()}
        for name, classes in self.classes.items():
            counts[name] = len(classes) - classes.count(None)
        return counts


def label_rows(
    rows: pa.Table,
    measures: tuple[Measure, ...],
    within: Within,
    least: int,
    bounds: Mapping[str, Bounds] | None = None,
) -> Labels:
    """Label the rows of a corpus.

    rows: the columns of `omni.texture.measured.MEASURED` and of `text_columns`.
    within: the rows whose terciles become classes; pauses are counted, alike in every corpus.
    least: rows that a speaker or a language needs for classes of its own.
    bounds: of each measure, those of another corpus to be used instead of terciles.
    """
    values: dict[str, np.ndarray] = {}
    classes: dict[str, list[str | None]] = {}
    summary: dict[str, Any] = {}
    groups: list[str | None] = ["corpus"] * len(rows)
    if within != "corpus":
        groups = rows[within].to_pylist()
    for measure in measures:
        found, missing = _values_of(measure, rows)
        for name, decimals in _VALUES[measure].items():
            values[name] = np.round(found[name], decimals)
        main = next(iter(_VALUES[measure]))
        name = _CLASSES[measure]
        if measure == "pauses":
            made = Classes([_pause_class(count) for count in values[main].tolist()], {})
        else:
            needed = 0 if within == "corpus" else least
            given = None if bounds is None else bounds[measure]
            made = terciles(found[main], groups, within, needed, given)
        classes[name] = made.classes
        summary[measure] = {
            "utterances": int((~np.isnan(found[main])).sum()),
            "missing": missing,
            "quantiles": _quantiles(found[main]),
            "classes": dict(sorted(Counter(c for c in made.classes if c is not None).items())),
            "without_class": made.without,
            "bounds": made.bounds,
        }
    return Labels(values, classes, summary)


def _pause_class(count: float) -> str | None:
    return None if np.isnan(count) else PAUSES[min(int(count), 2)]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {}
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {f"{share:g}": round(float(np.quantile(known, share)), 3) for share in shares}


def _values_of(measure: Measure, rows: pa.Table) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the values of a measure, nan where there is none, and counts of those by reason."""
    faults = rows["fault"].to_pylist()
    silent = _numbers(rows, "speech_seconds") == 0
    # From the first reason to the last; a row is counted under the first that is true of it.
    reasons: list[tuple[str, np.ndarray]] = [
        (reason, np.asarray([fault == reason for fault in faults]))
        for reason in sorted({fault for fault in faults if fault is not None})
    ]
    if measure == "rate":
        letters = _numbers(rows, "letters")
        reasons += [
            ("no transcript", np.isnan(letters)),
            ("digits in the text", rows["digits"].to_numpy(zero_copy_only=False)),
            ("no letters in the text", letters == 0),
        ]
    reasons.append(("no speech", silent))
    if measure == "pitch":
        reasons.append(("unvoiced", np.isnan(_numbers(rows, "pitch_hz"))))
    left = np.ones(len(rows), bool)
    missing: dict[str, int] = {}
    for reason, mask in reasons:
        if count := int((left & mask).sum()):
            missing[reason] = count
        left &= ~mask
    if measure == "rate":
        speech = np.where(left, _numbers(rows, "speech_seconds"), 1.0)
        found = {"characters_per_second": letters / speech}
    elif measure == "energy":
        found = {"energy_db": _numbers(rows, "level_db")}
    else:
        found = {name: _numbers(rows, name) for name in _VALUES[measure]}
    return {name: np.where(left, column, np.nan) for name, column in found.items()}, missing


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    """Return a column as (n,) float64, nan for null."""
    column = rows[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.asarray(column, np.float64)
