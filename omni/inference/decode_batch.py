"""Decode features to transcripts and score them, in training and in the jobs after it alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni.audio.decode import AudioSpan
from omni.corpus.languages import language_code
from omni.metrics.score import Errors, by_characters, count_errors, total, units
from omni.model.chat_template import Template
from omni.model.decode import Choice, Decoder, Decoding, Request, decode
from omni.model.lm.generate import Answer
from omni.model.speech_lm import OmniModel
from omni.stream.collate import Utterance

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
    def recording(self) -> tuple[str, AudioSpan]:
        """Name the recording: utterances of several tasks may have the same one."""
        return self.uri, self.span

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
    """An answer as text. cut: it ends where decoding was stopped, at `eval.max_new_tokens`.

    alone: texts of the other decoders, see `omni.model.decode.Choice`.
    """

    text: str
    cut: bool
    decoder: Decoder = "lm"
    alone: Mapping[Decoder, str] = field(default_factory=dict)
    log_prob: float | None = field(default=None, compare=False)
    """Log-probability of the answer in nats: by CTC for the decoder `ctc`, else by the language
    model."""
    tokens: int = 0
    """Tokens that this is about: those of the answer, and its end."""


def request_of(utterance: Utterance) -> Request:
    """Ask for the answer to an utterance that has features."""
    return Request(utterance.prompt, utterance.features or (), utterance.transcription)


def text_of(template: Template, ids: Sequence[int]) -> str:
    """Decode the tokens of an answer, or of its beginning."""
    return template.tokenizer.decode(ids).strip()


def as_text(template: Template, choice: Choice) -> Decoded:
    """Return an answer as text."""

    def text(answer: Answer) -> str:
        return text_of(template, answer.ids)

    answer = choice.answer
    return Decoded(
        text(answer),
        answer.cut,
        choice.decoder,
        {decoder: text(other) for decoder, other in choice.alone.items()},
        answer.log_prob,
        len(answer.ids) + (not answer.cut),
    )


def transcribe(
    model: OmniModel,
    template: Template,
    held: Sequence[HeldUtterance],
    decoding: Decoding,
) -> list[dict[str, Any]]:
    """Decode utterances, and return their transcript rows; one without features has none."""
    usable = [h for h in held if h.utterance.features is not None]
    requests = [request_of(h.utterance) for h in usable]
    choices = decode(model, requests, end=template.end, settings=decoding)
    return [
        {
            "number": h.utterance.number,
            **transcript_row(h.id, h.location, h.text, h.language, as_text(template, choice)),
        }
        for h, choice in zip(usable, choices, strict=True)
    ]


def transcript_row(
    name: str, location: dict[str, Any], reference: str, language: str, answer: Decoded
) -> dict[str, Any]:
    """Score an answer; the row has the field "cut" if it was cut.

    location: see `location_of`. "alone" holds the texts of the other decoders, if there are any.
    """
    errors = count_errors(reference, answer.text, language)
    alone = {d: count_errors(reference, text, language) for d, text in answer.alone.items()}
    return {
        "id": name,
        **location,
        "language": language,
        "reference": reference,
        "hypothesis": answer.text,
        "wer": errors.wer,
        **({"cut": True} if answer.cut else {}),
        "decoder": answer.decoder,
        **({"alone": dict(answer.alone)} if answer.alone else {}),
        "errors": errors,
        "errors_alone": alone,
    }


def without_counts(row: dict[str, Any]) -> dict[str, Any]:
    """Return a transcript row as a file holds it: without the counts of edits."""
    return {k: v for k, v in row.items() if k not in ("errors", "errors_alone")}


def count_cut(rows: Sequence[dict[str, Any]]) -> int:
    """Count the transcript rows whose answer was cut."""
    return sum("cut" in row for row in rows)


def count_decoders(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count the transcript rows of each decoder."""
    return dict(sorted(Counter(row["decoder"] for row in rows).items()))


def wer_alone(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Compute the WER of the language model alone, and of the CTC head alone.

    Both are about the rows that the CTC head can decode: those whose answer is what is said. Empty
    without such rows; a decoder that was not run has none.
    """
    counts: dict[str, list[Errors]] = {}
    for row in rows:
        if row["errors_alone"] or row["decoder"] == "ctc":
            for decoder, errors in {row["decoder"]: row["errors"], **row["errors_alone"]}.items():
                counts.setdefault(decoder, []).append(errors)
    return {name: total(counts[name]).wer for name in ("lm", "ctc") if name in counts}


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
