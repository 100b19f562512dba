"""Word differences between a reference and a hypothesis."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal

import jiwer
import regex

from omni.corpus.text import UNSPACED_SCRIPTS

_S = UNSPACED_SCRIPTS  # written without spaces: a word is a character
_WORD = regex.compile(rf"(?=[{_S}])\X|(?:(?![{_S}])[^\s\-–—])+")


@dataclass(frozen=True)
class Word:
    """A piece of the hypothesis as written, or a missing word of the reference.

    kind: the HTML element that marks it, "" if it is right. before: what stands before it.
    """

    text: str
    kind: Literal["", "mark", "ins", "del"] = ""
    reference: str = ""
    before: str = ""


def compare_words(reference: str, hypothesis: str) -> list[Word]:
    """Align the words with the fewest edits; case and punctuation do not count."""
    wanted, written = (
        [m for m in _WORD.finditer(t) if _key(m[0])] for t in (reference, hypothesis)
    )
    left, right = (" ".join(_key(m[0]) for m in words) for words in (wanted, written))
    found: list[Word] = []
    end = 0
    for chunk in jiwer.process_words(left, right).alignments[0]:
        spoken = [m[0] for m in wanted[chunk.ref_start_idx : chunk.ref_end_idx]]
        if chunk.type == "delete":
            found += [Word(word, "del") for word in spoken]
            continue
        for n, match in enumerate(written[chunk.hyp_start_idx : chunk.hyp_end_idx]):
            before, end = hypothesis[end : match.start()], match.end()
            if chunk.type == "substitute":
                found.append(Word(match[0], "mark", spoken[n], before))
            else:
                found.append(Word(match[0], "ins" if chunk.type == "insert" else "", "", before))
    return [*found, Word(hypothesis[end:])] if found or hypothesis[end:] else []


def _key(word: str) -> str:
    """Return what is compared: letters, marks and numbers, without case."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")
