"""Measure how sure a transcript is, without a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omni.inference.decode_batch import Decoded
from omni.metrics.score import count_errors


@dataclass(frozen=True)
class Confidence:
    """token_probability: geometric mean of the probabilities of the answer's tokens, its end
    included, by the model that wrote it. ctc_agreement: 1 minus the share of characters in which
    the text differs from what the CTC head alone reads; None without one."""

    token_probability: float | None
    ctc_agreement: float | None

    @property
    def value(self) -> float | None:
        """The product of both, or the one that is known."""
        known = [v for v in (self.token_probability, self.ctc_agreement) if v is not None]
        return math.prod(known) if known else None

    @property
    def fields(self) -> dict[str, float]:
        """Columns of a transcript."""
        columns = {
            "confidence": self.value,
            "token_probability": self.token_probability,
            "ctc_agreement": self.ctc_agreement,
        }
        return {name: round(value, 6) for name, value in columns.items() if value is not None}


def confidence_of(found: Decoded, language: str = "en") -> Confidence:
    """Measure how sure a transcript is."""
    probability = None
    if found.log_prob is not None and found.tokens:
        probability = math.exp(found.log_prob / found.tokens)
    other, agreement = found.alone.get("ctc"), None
    if other is not None:
        same = other.strip() == found.text.strip()
        cer = count_errors(other, found.text, language).cer
        agreement = 1.0 if same else max(0.0, 1.0 - (1.0 if cer is None else cer))
    return Confidence(probability, agreement)
