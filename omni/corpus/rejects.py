"""Describe utterances that are left out, and count them by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Reject:
    """An utterance that is left out, with a short reason."""

    id: str
    uri: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Count rejects by reason, the most frequent first."""
    return dict(Counter(reasons).most_common())
