"""Texts of held-out corpora, which must not be trained on."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from whisper_normalizer.english import EnglishNumberNormalizer

from omni.corpus.index import read_index_folder
from omni.corpus.manifest import INDEX_FILE
from omni.corpus.sources import Options, open_source
from omni.errors import ManifestError
from omni.metrics.score import normalize
from omni.storage.path import as_path

HELD_OUT = ("embedded:dev", "embedded:test")
"""Always left out: what the smoke run and the docs evaluate on."""


_LONG = re.compile(r"(?<![\w'])[a-z]{5,}(?![\w'])")
_NUMBER_WORDS = frozenset(EnglishNumberNormalizer().words)


@functools.cache
def _is_stable(word: str) -> bool:
    """Check that a word of five letters or more stays itself in any sentence normalised."""
    return word not in _NUMBER_WORDS and normalize(word) == word


class Exclusion:
    """Texts, compared as they are scored: without case, punctuation and spelling variants."""

    def __init__(self, texts: Iterable[str]) -> None:
        known = {normalize(text) for text in texts} - {""}
        self._joined = "".join(f"\n {text} \n" for text in sorted(known))
        self._pairs = {pair for text in known for pair in pairwise(text.split())}
        self._words = {word for text in known for word in text.split()}
        self.count = len(known)

    def has(self, text: str) -> bool:
        """Check whether a text is one of these, or a run of words in one of them."""
        if any(w not in self._words and _is_stable(w) for w in _LONG.findall(text.lower())):
            return False
        words = normalize(text).split()  # 0.2 ms, for a few sentences in a hundred
        if not words:
            return False
        if len(words) > 1 and (words[0], words[1]) not in self._pairs:  # rules out nearly all
            return False
        return f" {' '.join(words)} " in self._joined


def read_texts(specs: Iterable[str]) -> Iterator[str]:
    """Yield the texts of corpora: any SPEC of `omni index`, or an index. Raises ManifestError."""
    for spec in specs:
        path = None if ":" in spec else as_path(spec)
        if path is not None and (path / INDEX_FILE).is_file():
            table, _ = read_index_folder(path)
            yield from table["text"].to_pylist()
            continue
        source = open_source(spec, Options(allow_absolute=True))  # Only texts are read.
        found = 0
        for part in source.parts():
            for row in source.read(part):
                if row.error is not None:
                    reason, detail = row.error
                    raise ManifestError(f"{spec}: {row.id} cannot be left out: {reason}: {detail}")
                if row.text:
                    found += 1
                    yield row.text
        if not found:
            raise ManifestError(f"{spec}: expected a corpus with texts, found none")
