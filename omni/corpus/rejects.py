"""Sum up the utterances that are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from omni.corpus.lengths import Reject
from omni.corpus.other_files import NOT_A_RECORDING, other_files_note


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Count rejects by reason, the most frequent first."""
    return dict(Counter(reasons).most_common())


def without_other_files(rejects: Iterable[Reject]) -> tuple[list[Reject], list[str]]:
    """Separate rejected utterances from files that hold none; those are told of in notes."""
    utterances: list[Reject] = []
    others: list[Reject] = []
    for reject in rejects:
        (others if reject.reason == NOT_A_RECORDING else utterances).append(reject)
    return utterances, other_files_note(others)
