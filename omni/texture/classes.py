"""Divide measured values into classes: terciles of a corpus, a language or a speaker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

TERCILES = ("low", "mid", "high")
_FEWEST = 3
"""Fewer values have no terciles."""


@dataclass(frozen=True)
class Classes:
    """Classes of values, and why some have none.

    classes: of each value. bounds: of each group, the two values at which its classes end.
    without: counts of values without a class, by reason.
    """

    classes: list[str | None]
    bounds: dict[str, tuple[float, float]]
    without: dict[str, int] = field(default_factory=dict)


def terciles(
    values: np.ndarray,
    groups: Sequence[str | None],
    noun: str,
    least: int = _FEWEST,
    bounds: Mapping[str, Sequence[float]] | None = None,
) -> Classes:
    """Divide the values of each group into terciles; a bound belongs to the class below it.

    values: (n,) float64, nan for none, which has no class and is not counted here. groups: of each
    value; None: unknown. noun: what a group is, for reasons. least: values that a group needs.
    bounds: those of each group in another corpus, to be used instead of terciles.
    """
    least = max(least, _FEWEST)
    known = [str(group) for group in groups if group is not None]
    names, codes = np.unique(np.asarray(known, object).astype(str), return_inverse=True)
    group_of = np.full(len(values), -1)
    group_of[[n for n, group in enumerate(groups) if group is not None]] = codes
    present = ~np.isnan(values)
    found = np.full(len(values), -1)
    used: dict[str, tuple[float, float]] = {}
    without: dict[str, int] = {}

    def leave_out(count: int, reason: str) -> None:
        if count:
            without[reason] = without.get(reason, 0) + count

    leave_out(int((present & (group_of < 0)).sum()), f"no {noun}")
    order = np.flatnonzero(present & (group_of >= 0))
    order = order[np.argsort(group_of[order], kind="stable")]
    starts = np.searchsorted(group_of[order], np.arange(len(names) + 1))
    for number, name in enumerate(names.tolist()):
        members = order[starts[number] : starts[number + 1]]
        if not len(members):
            continue
        if bounds is not None:
            if name not in bounds:
                leave_out(len(members), f"no bounds of the {noun}")
                continue
            low, high = bounds[name]
        else:
            if len(members) < least:
                leave_out(len(members), f"fewer than {least} of the {noun}")
                continue
            low, high = np.quantile(values[members], [1 / 3, 2 / 3]).tolist()
            if not low < high:
                leave_out(len(members), f"values of the {noun} are too alike")
                continue
        used[name] = (low, high)
        found[members] = np.searchsorted([low, high], values[members], side="left")
    classes = [None if code < 0 else TERCILES[code] for code in found.tolist()]
    return Classes(classes, used, without)
