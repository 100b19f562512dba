"""Features to transcripts and their scores: one path for training and for the jobs after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni.data.collate import Utterance
from omni.model.generate import generate
from omni.model.omni import OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.score import Errors, count_errors, total

_DECODE_BATCH = 32
SHORT_WORDS = 2  # isolated words and letters, hard to hear out of context: counted apart


@dataclass(frozen=True)
class HeldUtterance:
    """An utterance in a rank's memory, with what a transcript table needs."""

    utterance: Utterance
    id: str
    uri: str
    text: str
    language: str = "en"


def transcribe(
    model: OmniModel, tokenizer: SpeechTokenizer, held: Sequence[HeldUtterance]
) -> list[dict[str, Any]]:
    """Decode utterances, similar lengths together; one transcript row each, shortest first."""
    usable = [h for h in held if h.utterance.features_TF is not None]
    usable.sort(key=_length)
    rows: list[dict[str, Any]] = []
    for first in range(0, len(usable), _DECODE_BATCH):
        rows += _transcribe_group(model, tokenizer, usable[first : first + _DECODE_BATCH])
    return rows


def _length(held: HeldUtterance) -> tuple[int, int]:
    features = held.utterance.features_TF
    return (0 if features is None else len(features), held.utterance.number)


def _transcribe_group(
    model: OmniModel, tokenizer: SpeechTokenizer, group: list[HeldUtterance]
) -> list[dict[str, Any]]:
    """Decode utterances with the same prompt together; one transcript row each."""
    by_prompt: dict[tuple[int, ...], list[HeldUtterance]] = {}
    for held in group:
        by_prompt.setdefault(tuple(held.utterance.prompt_ids), []).append(held)
    rows = []
    for prompt, members in by_prompt.items():
        features = [m.utterance.features_TF for m in members if m.utterance.features_TF is not None]
        answers = generate(model, features, bos=tokenizer.bos, end=tokenizer.end, prompt_ids=prompt)
        for member, ids in zip(members, answers, strict=True):
            hypothesis = tokenizer.decode(ids).strip()
            errors = count_errors(member.text, hypothesis, member.language)
            rows.append(
                {
                    "number": member.utterance.number,
                    "id": member.id,
                    "audio": member.uri,
                    "reference": member.text,
                    "hypothesis": hypothesis,
                    "wer": errors.wer,
                    "errors": errors,
                }
            )
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Errors]:
    """Edit counts of transcript rows: all, and short and longer references apart."""
    short = [len(row["reference"].split()) <= SHORT_WORDS for row in rows]
    return {
        "all": total([row["errors"] for row in rows]),
        "short": total([row["errors"] for row, s in zip(rows, short, strict=True) if s]),
        "long": total([row["errors"] for row, s in zip(rows, short, strict=True) if not s]),
    }
