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
        """Return the columns that say where the recording is."""
        return location_of(self.uri, self.span)


def location_of(uri: str, span: AudioSpan) -> dict[str, Any]:
    """Return the columns that say where a recording is; a whole file needs only `audio`."""
    columns = {"start": span.start or None, "duration": span.duration, "bytes": span.bytes}
    return {"audio": uri, **{k: v for k, v in columns.items() if v is not None}}


@dataclass(frozen=True)
class Decoded:
    """An answer as text. cut: it ends where decoding was stopped, at `eval.max_new_tokens`."""

    text: str
    cut: bool


def decode_batch(
    model: OmniModel,
    template: Template,
    utterances: Sequence[Utterance],
    max_new_tokens: int | None,
) -> list[Decoded]:
    """Decode utterances that have features, in batches of similar length.

    max_new_tokens: see `generate`.
    """
    order = sorted(range(len(utterances)), key=lambda i: _length(utterances[i]))
    decoded: dict[int, Decoded] = {}
    for first in range(0, len(order), _DECODE_BATCH):
        chosen = order[first : first + _DECODE_BATCH]
        group = [utterances[i] for i in chosen]
        answers = generate(
            model,
            [utterance.prompt for utterance in group],
            [utterance.features or () for utterance in group],
            end=template.end,
            max_new_tokens=max_new_tokens,
        )
        for i, answer in zip(chosen, answers, strict=True):
            decoded[i] = Decoded(template.tokenizer.decode(answer.ids).strip(), answer.cut)
    return [decoded[i] for i in range(len(utterances))]


def _length(utterance: Utterance) -> tuple[int, int]:
    return sum(map(len, utterance.features or ())), utterance.number


def transcribe(
    model: OmniModel,
    template: Template,
    held: Sequence[HeldUtterance],
    max_new_tokens: int | None,
) -> list[dict[str, Any]]:
    """Decode utterances, and return their transcript rows; one without features has none."""
    usable = [h for h in held if h.utterance.features is not None]
    answers = decode_batch(model, template, [h.utterance for h in usable], max_new_tokens)
    return [
        {
            "number": h.utterance.number,
            **transcript_row(h.id, h.location, h.text, h.language, answer),
        }
        for h, answer in zip(usable, answers, strict=True)
    ]


def transcript_row(
    name: str, location: dict[str, Any], reference: str, language: str, answer: Decoded
) -> dict[str, Any]:
    """Score an answer; the row has the field "cut" if it was cut.

    location: see `location_of`.
    """
    errors = count_errors(reference, answer.text, language)
    return {
        "id": name,
        **location,
        "language": language,
        "reference": reference,
        "hypothesis": answer.text,
        "wer": errors.wer,
        **({"cut": True} if answer.cut else {}),
        "errors": errors,
    }


def count_cut(rows: Sequence[dict[str, Any]]) -> int:
    """Count the transcript rows whose answer was cut."""
    return sum("cut" in row for row in rows)


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
