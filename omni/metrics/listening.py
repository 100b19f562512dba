"""Compare the WER of the language model alone with that of the CTC head beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MUCH_BETTER = 0.8
"""The CTC head is much better with at most this share of the language model's errors."""


def listening_note(figures: Mapping[str, Any]) -> str | None:
    """Say that the CTC head alone is much better on dev than the language model alone, if it is.

    figures: of summary.json or of an evaluation. Both read the same soft tokens, so what the head
    spells and the language model does not write is there for it to use.
    """
    lm, ctc = (_rate(figures.get(f"dev_{name}_wer")) for name in ("lm", "ctc"))
    if lm is None or ctc is None or ctc > _MUCH_BETTER * lm:
        return None
    return (
        f"the CTC head alone has a dev WER of {ctc:.1%}, the language model alone {lm:.1%}: it "
        "does not use all that it hears yet"
    )


def _rate(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
