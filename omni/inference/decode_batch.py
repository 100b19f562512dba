"""Decode features to transcripts and score them, in training and in the jobs after it alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni.audio.decode import AudioSpan
from omni.corpus.languages import language_code
from omni.metrics.score import Errors, by_characters, count_errors, total, units
from omni.model.chat_template import Template
from omni.model.lm.generate import generate
from omni.model.speech_lm import OmniModel
from omni.stream.collate import Utterance

_DECODE_BATCH = 32
# References of at most this many words are scored apart: without context they are hard to hear.
SHORT_WORDS = 2
# A language without spaces is counted in characters, and this many stand for a word.
_WORD_CHARACTERS = 2


@dataclass(frozen=True)
class HeldUtterance:
    """Hold an utterance in memory, with the columns of its row in a transcript table."""

    utterance: Utterance
    id: str
    uri: str
    text: str
    language: str = "en"
    span: AudioSpan = AudioSpan()
    """Position of the recording in the file at `uri`."""

    @property
    def location(self) -> dict[str, Any]:
        """Return the columns that say where the recording is; a whole file needs only `audio`."""
        span = {
            "start": self.span.start or None,
            "duration": self.span.duration,
            "bytes": self.span.bytes,
        }
        return {"audio": self.uri, **{k: v for k, v in span.items() if v is not None}}


def transcribe(
    model: OmniModel, template: Template, held: Sequence[HeldUtterance]
) -> list[dict[str, Any]]:
    """Decode utterances in batches of similar length, and return their transcript rows.

    Rows come shortest utterance first; an utterance without features has none.
    """
    usable = [h for h in held if h.utterance.features is not None]
    usable.sort(key=_length)
    rows: list[dict[str, Any]] = []
    for first in range(0, len(usable), _DECODE_BATCH):
        rows += _transcribe_group(model, template, usable[first : first + _DECODE_BATCH])
    return rows


def _length(held: HeldUtterance) -> tuple[int, int]:
    return sum(map(len, held.utterance.features or ())), held.utterance.number


def _transcribe_group(
    model: OmniModel, template: Template, group: list[HeldUtterance]
) -> list[dict[str, Any]]:
    """Decode utterances as one batch, and return a transcript row for each."""
    answers = generate(
        model,
        [held.utterance.prompt for held in group],
        [held.utterance.features or () for held in group],
        end=template.end,
    )
    rows = []
    for held, ids in zip(group, answers, strict=True):
        hypothesis = template.tokenizer.decode(ids).strip()
        errors = count_errors(held.text, hypothesis, held.language)
        rows.append(
            {
                "number": held.utterance.number,
                "id": held.id,
                **held.location,
                "language": held.language,
                "reference": held.text,
                "hypothesis": hypothesis,
                "wer": errors.wer,
                "errors": errors,
            }
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Errors]:
    """Add up the edit counts of transcript rows: of all, of short references, of longer ones."""
    short = [_is_short(row["reference"], row["language"]) for row in rows]
    return {
        "all": total([row["errors"] for row in rows]),
        "short": total([row["errors"] for row, s in zip(rows, short, strict=True) if s]),
        "long": total([row["errors"] for row, s in zip(rows, short, strict=True) if not s]),
    }


def _is_short(reference: str, language: str) -> bool:
    characters = _WORD_CHARACTERS if by_characters(language) else 1
    return len(units(reference, language)) <= SHORT_WORDS * characters


def by_language(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compute error rates of transcript rows per language; empty for fewer than two languages.

    wer, cer: fractions, None without reference words. by: the rate to quote for the language.
    """
    languages = sorted({language_code(row["language"]) for row in rows})
    if len(languages) < 2:
        return {}
    rates = {}
    for language in languages:
        counts = [row["errors"] for row in rows if language_code(row["language"]) == language]
        errors = total(counts)
        rates[language] = {
            "wer": errors.wer,
            "cer": errors.cer,
            "utterances": len(counts),
            "by": "cer" if by_characters(language) else "wer",
        }
    return rates
