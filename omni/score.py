"""Word and character error rates that anybody can reproduce: Whisper's normaliser and jiwer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer


@functools.lru_cache(maxsize=2)
def _normalizer(english: bool) -> EnglishTextNormalizer | BasicTextNormalizer:
    return EnglishTextNormalizer() if english else BasicTextNormalizer()


def normalize(text: str, language: str = "en") -> str:
    """Whisper's English normaliser for `en`, its basic one for other languages."""
    return str(_normalizer(language == "en")(text)).strip()


@dataclass(frozen=True)
class Errors:
    """Edit counts; they add up, so ranks and corpora can be summed before dividing.

    `words` and `chars` are those of the references. References that normalise to nothing count
    their hypothesis' words as insertions.
    """

    word_errors: int = 0
    words: int = 0
    char_errors: int = 0
    chars: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.word_errors + other.word_errors,
            self.words + other.words,
            self.char_errors + other.char_errors,
            self.chars + other.chars,
        )

    @property
    def wer(self) -> float | None:
        return self.word_errors / self.words if self.words else None

    @property
    def cer(self) -> float | None:
        return self.char_errors / self.chars if self.chars else None


def count_errors(reference: str, hypothesis: str, language: str = "en") -> Errors:
    """Edit counts of one utterance after normalisation."""
    reference, hypothesis = normalize(reference, language), normalize(hypothesis, language)
    if not reference:
        return Errors(word_errors=len(hypothesis.split()), char_errors=len(hypothesis))
    words = jiwer.process_words(reference, hypothesis)
    chars = jiwer.process_characters(reference, hypothesis)
    return Errors(
        words.substitutions + words.deletions + words.insertions,
        words.hits + words.substitutions + words.deletions,
        chars.substitutions + chars.deletions + chars.insertions,
        chars.hits + chars.substitutions + chars.deletions,
    )


def total(errors: Sequence[Errors]) -> Errors:
    return sum(errors, Errors())
