"""Word and character error rates, with Whisper's text normaliser and jiwer.

Languages that are written without spaces between words are scored by characters, as in the paper on
Whisper (Radford et al. 2022, appendix C): there a "word" is a character, or a run of letters of a
script with spaces (the mixed error rate of the literature on code switching).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jiwer
import regex
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from omni.corpus.languages import UNSPACED, language_code
from omni.corpus.text import UNSPACED_SCRIPTS

_UNITS = regex.compile(rf"(?=[{UNSPACED_SCRIPTS}])\X|(?:(?![{UNSPACED_SCRIPTS}])\S)+")
# Format characters, variation selectors, enclosing marks.
_INVISIBLE = regex.compile(r"[\p{Cf}\ufe00-\ufe0f\U000e0100-\U000e01ef\p{Me}]")
_STRAY_MARKS = regex.compile(r"(?<![\p{L}\p{N}\p{M}])\p{M}+")  # marks without a letter
_STRESSED = frozenset(("ru", "uk", "be", "bg"))  # Stress marks are not part of the spelling.


@functools.lru_cache(maxsize=2)
def _normalizer(english: bool) -> EnglishTextNormalizer | BasicTextNormalizer:
    # Without preserve_marks a space replaces every combining mark that NFKC leaves, as in OpenAI's
    # whisper/normalizers/basic.py: Hindi, Thai and Burmese would lose their vowels, and words would
    # fall apart.
    return EnglishTextNormalizer() if english else BasicTextNormalizer(preserve_marks=True)


def normalize(text: str, language: str = "en") -> str:
    """Normalise with Whisper's English normaliser for `en`, its basic one for other languages.

    Text for the basic one is brought to NFKC first, so that it knows full-width brackets, and keeps
    the combining marks of letters.
    """
    code = language_code(language)
    if code != "en":
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
        if code in _STRESSED:
            text = text.replace("\u0301", "").replace("\u0300", "")
        text = _STRAY_MARKS.sub(" ", text)
    return str(_normalizer(code == "en")(text)).strip()


def by_characters(language: str) -> bool:
    """Return True for languages without spaces between words, for which the CER is quoted."""
    return language_code(language) in UNSPACED


def units(text: str, language: str = "en") -> list[str]:
    """Split text into words. In a language without spaces, each character (grapheme cluster, as in
    Whisper's `split_letters`) is a word, and so is a run of letters of another script.
    """
    return _UNITS.findall(text) if by_characters(language) else text.split()


@dataclass(frozen=True)
class Errors:
    """Counts of edits, to be summed over utterances and ranks before dividing.

    words, chars: of the references. If a reference normalises to nothing, the words of its
    hypothesis count as insertions.
    """

    word_errors: int = 0
    words: int = 0
    char_errors: int = 0
    chars: int = 0
    insertions: int = 0
    """Words that were written and not said; part of `word_errors`, as are deletions."""
    deletions: int = 0

    def __add__(self, other: Errors) -> Errors:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Errors(*(mine + theirs for mine, theirs in pairs))

    @property
    def substitutions(self) -> int:
        return self.word_errors - self.insertions - self.deletions

    @property
    def wer(self) -> float | None:
        return self.word_errors / self.words if self.words else None

    @property
    def cer(self) -> float | None:
        return self.char_errors / self.chars if self.chars else None


def count_errors(reference: str, hypothesis: str, language: str = "en") -> Errors:
    """Count the edits of one utterance after normalisation.

    Characters are code points, including spaces unless the language has none.
    """
    reference, hypothesis = normalize(reference, language), normalize(hypothesis, language)
    spoken, written = " ".join(units(reference, language)), " ".join(units(hypothesis, language))
    if by_characters(language):
        reference, hypothesis = ("".join(text.split()) for text in (reference, hypothesis))
    if not reference:
        extra = len(written.split())
        return Errors(word_errors=extra, char_errors=len(hypothesis), insertions=extra)
    words = jiwer.process_words(spoken, written)
    chars = jiwer.process_characters(reference, hypothesis)
    return Errors(
        words.substitutions + words.deletions + words.insertions,
        words.hits + words.substitutions + words.deletions,
        chars.substitutions + chars.deletions + chars.insertions,
        chars.hits + chars.substitutions + chars.deletions,
        words.insertions,
        words.deletions,
    )


def total(errors: Sequence[Errors]) -> Errors:
    return sum(errors, Errors())
