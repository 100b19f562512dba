"""Word and character error rates that anybody can reproduce: Whisper's normaliser and jiwer.

Languages that are written without spaces between words are scored by characters, as in the paper on
Whisper (Radford et al. 2022, appendix C): there a "word" is a character, or a run of letters of a
script with spaces (the mixed error rate of the literature on code switching).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import regex
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from omni.corpus.text import UNSPACED, UNSPACED_SCRIPTS, language_code

_UNITS = regex.compile(rf"(?=[{UNSPACED_SCRIPTS}])\X|(?:(?![{UNSPACED_SCRIPTS}])\S)+")
# Joiners, soft hyphens, marks of direction; variants of a character; circles around it.
_INVISIBLE = regex.compile(r"[\p{Cf}\ufe00-\ufe0f\U000e0100-\U000e01ef\p{Me}]")
_STRAY_MARKS = regex.compile(r"(?<![\p{L}\p{N}\p{M}])\p{M}+")  # on nothing that is spoken
_STRESSED = frozenset(("ru", "uk", "be", "bg"))  # in dictionaries and primers only


@functools.lru_cache(maxsize=2)
def _normalizer(english: bool) -> EnglishTextNormalizer | BasicTextNormalizer:
    # Without preserve_marks it puts a space in the place of every combining mark that NFKC leaves,
    # as OpenAI's does (whisper/normalizers/basic.py, remove_symbols: categories M, S and P): of
    # Hindi, Thai, Burmese the vowels would be gone and the words in pieces.
    return EnglishTextNormalizer() if english else BasicTextNormalizer(preserve_marks=True)


def normalize(text: str, language: str = "en") -> str:
    """Whisper's English normaliser for `en`, its basic one for other languages.

    The basic one is given NFKC, so that full-width brackets are brackets to it, and keeps combining
    marks that stand on a letter.
    """
    code = language_code(language)
    if code != "en":
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
        if code in _STRESSED:
            text = text.replace("\u0301", "").replace("\u0300", "")
        text = _STRAY_MARKS.sub(" ", text)
    return str(_normalizer(code == "en")(text)).strip()


def by_characters(language: str) -> bool:
    """Whether a language's headline is its CER: it is written without spaces between words."""
    return language_code(language) in UNSPACED


def units(text: str, language: str = "en") -> list[str]:
    """What counts as a word: between spaces; of a language without them a character (a grapheme
    cluster, as Whisper's `split_letters` has it), or a run of letters of another script.
    """
    return _UNITS.findall(text) if by_characters(language) else text.split()


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
    """Edit counts of one utterance after normalisation.

    Characters are code points, spaces among them unless the language has none.
    """
    reference, hypothesis = normalize(reference, language), normalize(hypothesis, language)
    wanted, heard = " ".join(units(reference, language)), " ".join(units(hypothesis, language))
    if by_characters(language):
        reference, hypothesis = ("".join(text.split()) for text in (reference, hypothesis))
    if not reference:
        return Errors(word_errors=len(heard.split()), char_errors=len(hypothesis))
    words = jiwer.process_words(wanted, heard)
    chars = jiwer.process_characters(reference, hypothesis)
    return Errors(
        words.substitutions + words.deletions + words.insertions,
        words.hits + words.substitutions + words.deletions,
        chars.substitutions + chars.deletions + chars.insertions,
        chars.hits + chars.substitutions + chars.deletions,
    )


def total(errors: Sequence[Errors]) -> Errors:
    return sum(errors, Errors())
