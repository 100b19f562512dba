"""Read sentences from WordNet's files: definitions, and the examples that stand in quotes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from omni.errors import ConfigError
from omni.recipes.exclusion import Exclusion

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
FEWEST_WORDS, MOST_WORDS = 3, 22
_EXAMPLE = re.compile(r'"([^"]*)"')
_ASIDE = re.compile(r"\([^()]*\)")
_KNOWN = re.compile(r"[A-Za-z ',.?!:;-]*")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Za-z]\.){2}|\b(?:etc|esp|usu|eg|ie|cf|vs|approx|abbr|pl|sing|ca|Jr|Sr|St|Mt)\b\.?"
)
_CAPITALS = re.compile(r"\b[A-Z]{2,}")
_LETTER = re.compile(r"(?<![\w'])[B-HJ-NP-Zb-z](?![\w'])")


@dataclass(frozen=True)
class Sentences:
    """Sentences in the order of the files, each once, and how many were left out, by reason."""

    texts: list[str]
    left_out: Counter[str]


def read_glosses(folder: Path) -> Iterator[str]:
    """Yield the gloss of every synset. Raises ConfigError where files are missing or damaged."""
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise ConfigError(
                f"--wordnet: there is no {name} in {folder}; expected the files of WordNet 3, "
                "which Debian's package wordnet-base puts into /usr/share/wordnet "
                "(apt-get install wordnet-base)"
            )
        with path.open(encoding="latin-1") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith("  "):  # the licence
                    continue
                _, bar, gloss = line.partition(" | ")
                if not bar:
                    raise ConfigError(f"{path}:{number}: expected a synset with ' | ' and a gloss")
                yield gloss.strip()


def licence_of(folder: Path) -> str:
    """Return the licence that WordNet's own file begins with."""
    with (folder / FILES[0]).open(encoding="latin-1") as lines:
        kept = []
        for line in lines:
            if not line.startswith("  "):
                break
            kept.append(re.sub(r"^  \d+ ?", "", line).rstrip())
    return "\n".join(kept) + "\n"


def select_sentences(glosses: Iterable[str], exclusion: Exclusion) -> Sentences:
    """Clean the sentences of glosses; leave out what no voice would read as it is written.

    Sentences are compared by their letters alone, so that each is there once.
    """
    texts: list[str] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for gloss in glosses:
        for piece in _pieces(gloss):
            text, reason = clean(piece)
            if not reason and (letters := re.sub("[^a-z]", "", text.lower())) in seen:
                reason = "repeated"
            if not reason and exclusion.has(text):
                reason = "excluded"
            if reason:
                left_out[reason] += 1
                continue
            seen.add(letters)
            texts.append(text)
    return Sentences(texts, left_out)


def _pieces(gloss: str) -> Iterator[str]:
    """Yield the definitions, which precede the first quote, and the examples."""
    definitions, _, _ = gloss.partition('"')
    # Semicolons also separate remarks inside parentheses, which are no sentences of their own.
    yield from (piece for piece in _ASIDE.sub(" ", definitions).split(";") if piece.strip())
    yield from _EXAMPLE.findall(gloss)


def clean(piece: str) -> tuple[str, str]:
    """Return (sentence, "") with a capital and a full stop, or ("", reason to leave it out)."""
    text = _ASIDE.sub(" ", piece)
    text = re.sub(r"\s*--+\s*|\s+-\s+", ", ", text)
    text = re.sub(r"\s+([,.?!:;])", r"\1", " ".join(text.split()))
    text = text.strip(" ,;:-").rstrip(" ,;:-")
    words = len(text.split())
    if any(c.isdigit() for c in text):
        return "", "digits"
    if not _KNOWN.fullmatch(text):
        return "", "other characters"
    if not FEWEST_WORDS <= words <= MOST_WORDS:
        return "", "fewer words" if words < FEWEST_WORDS else "more words"
    if _ABBREVIATION.search(text):
        return "", "abbreviations"
    if _CAPITALS.search(text) or _LETTER.search(text):
        return "", "words that are spelt"
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    if re.search(r"[,.?!:;]{2}|\.(?! )", text):
        return "", "runs of punctuation"
    text = text[0].upper() + text[1:]
    return text if text[-1] in "?!" else f"{text}.", ""
