"""Choose the utterances that a label is probed on, and the groups that stay on one side."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from omni.corpus.index_row import IndexRow
from omni.corpus.labels import labels_of
from omni.errors import ConfigError

Disjoint = Literal["sentence", "speaker"]
_MOST_NUMBERS = 20
"""More different numbers are no classes."""


@dataclass(frozen=True)
class Examples:
    """Utterances of one label.

    rows: (n,) their positions. targets: (n,) numbers of their classes. groups: (n,) numbers of
    sentences or speakers. left_out: counts of utterances by reason.
    """

    label: str
    disjoint: Disjoint
    rows: np.ndarray
    classes: list[str]
    targets: np.ndarray
    groups: np.ndarray
    left_out: dict[str, int]


def examples_of(
    rows: Sequence[IndexRow],
    faults: dict[int, str],
    label: str,
    disjoint: Disjoint | None,
    least: int,
    folds: int,
) -> Examples:
    """Choose the utterances of a label.

    disjoint: None takes speakers where each class has enough of them, else sentences; speakers
    themselves are told apart by other sentences of theirs. least:
    utterances that a class needs; it also needs as many groups as there are folds.
    Raises ConfigError for a label that is missing, and for fewer than two classes.
    """
    left_out: Counter[str] = Counter()
    values: dict[int, Any] = {}
    for number, row in enumerate(rows):
        value = labels_of(row).get(label)
        if value is None:
            left_out["no label"] += 1
        elif number in faults:
            left_out[faults[number]] += 1
        else:
            values[number] = value
    if not values:
        known = sorted({name for row in rows for name in labels_of(row)})
        found = f"found {', '.join(known)}" if known else "the rows have no labels"
        raise ConfigError(f"--label {label}: no utterance has it; {found}")
    if all(isinstance(value, float) for value in values.values()) or (
        not any(isinstance(value, str) for value in values.values())
        and len(set(values.values())) > _MOST_NUMBERS
    ):
        raise ConfigError(
            f"--label {label}: its values are numbers, expected classes "
            f"(`omni annotate` makes {label.partition('_')[0]}_class of some)"
        )
    class_of = {number: str(value) for number, value in values.items()}
    if label == "speaker":
        disjoint = "sentence"
    elif disjoint is None:
        disjoint = _usual(rows, class_of, least, folds)
    groups = {number: _group(rows[number], disjoint) for number in class_of}
    for number in [number for number, group in groups.items() if not group]:
        left_out[f"no {disjoint}"] += 1
        del class_of[number], groups[number]
    kept = _large_classes(class_of, groups, least, folds)
    for number in [number for number, name in class_of.items() if name not in kept]:
        reason = f"class of fewer than {least} utterances or {folds} {disjoint}s"
        left_out[reason] += 1
        del class_of[number]
    if len(kept) < 2:
        largest = Counter(map(str, values.values())).most_common(3)
        shown = ", ".join(f"{name} {count:,}" for name, count in largest)
        raise ConfigError(
            f"--label {label}: expected two classes or more of at least {least} utterances and "
            f"{folds} {disjoint}s each, got {len(kept)}; the largest: {shown}"
        )
    names = sorted(kept)
    members = sorted(class_of)
    group_names = sorted({groups[number] for number in members})
    group_number = {name: number for number, name in enumerate(group_names)}
    return Examples(
        label,
        disjoint,
        np.asarray(members),
        names,
        np.asarray([names.index(class_of[number]) for number in members]),
        np.asarray([group_number[groups[number]] for number in members]),
        dict(left_out.most_common()),
    )


def _usual(rows: Sequence[IndexRow], class_of: dict[int, str], least: int, folds: int) -> Disjoint:
    """Return speaker where that leaves out no class, and no more than a tenth of the utterances."""
    of_speaker = {number: _group(rows[number], "speaker") for number in class_of}
    known = {number: name for number, name in class_of.items() if of_speaker[number]}
    by_sentence = {number: _group(rows[number], "sentence") for number in class_of}
    wanted = _large_classes(class_of, by_sentence, least, folds)
    left = _large_classes(known, of_speaker, least, folds)
    return "speaker" if wanted == left and len(known) >= 0.9 * len(class_of) else "sentence"


def _large_classes(
    class_of: dict[int, str], groups: dict[int, str], least: int, folds: int
) -> set[str]:
    members: Counter[str] = Counter(class_of.values())
    of_class: dict[str, set[str]] = defaultdict(set)
    for number, name in class_of.items():
        of_class[name].add(groups[number])
    return {
        name for name, count in members.items() if count >= least and len(of_class[name]) >= folds
    }


def _group(row: IndexRow, disjoint: Disjoint) -> str:
    """Return the speaker, or the letters and digits of the text, of a row; empty: unknown."""
    if disjoint == "speaker":
        return row["speaker"] or ""
    return "".join(c for c in row["text"].casefold() if c.isalnum())
