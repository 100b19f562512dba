"""Encode text in which some special tokens are markup and others, spelled out by a user, are text.

A tokenizer finds special tokens by their names, wherever they stand. Here they have other names: a
few noncharacters of Unicode, which no text contains. Whoever writes markup puts these marks into
it, and a name that is spelled out is text like any other. Nothing else about the tokenizer differs,
so that spaces beside special tokens are treated as the tokenizer treats them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

AUDIO = -1  # id of a recording, which its soft tokens replace
AUDIO_MARK = "\ufdef"  # a recording, which is a special token among the others
_START, _DIGITS, _STOP = "\ufdd0", "\ufdd1", "\ufde1"
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
MARK = re.compile(f"{_START}[^{_STOP}]*{_STOP}|{AUDIO_MARK}")


@dataclass(frozen=True)
class MarkedIds:
    """Token ids of a marked text, and the characters that each of them stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]


class MarkEncoder:
    """A tokenizer that finds special tokens by their marks.

    names: special tokens besides those that the tokenizer declares as such.
    """

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        values = json.loads(tokenizer.to_str())
        added = {token["content"]: dict(token) for token in values["added_tokens"]}
        for name in names:
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            token = {"id": tokenizer.token_to_id(name), "content": name, **plain}
            added[name] = {**added.get(name, token), "special": True}
        tokens = sorted(added.values(), key=lambda token: int(token["id"]))
        special = [token["content"] for token in tokens if token["special"]]
        self._marks: dict[str, str] = {name: _mark(number) for number, name in enumerate(special)}
        self._names: dict[str, str] = {mark: name for name, mark in self._marks.items()}
        # The longest of several names at a place counts, as in the tokenizers library.
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._special: re.Pattern[str] = re.compile("|".join(longest_first) or "(?!)")
        marked = [{**t, "content": self._marks.get(t["content"], t["content"])} for t in tokens]
        audio_token = {**_AUDIO_TOKEN, "id": max([tokenizer.get_vocab_size(), *_ids(tokens)]) + 1}
        values["added_tokens"] = [*marked, audio_token]
        values["model"] = _renamed(values["model"], self._marks)
        values |= {"post_processor": None, "padding": None, "truncation": None}
        self._twin = Tokenizer.from_str(json.dumps(values))
        # Tokens that are not in the model's vocabulary may be numbered in another way.
        pairs = zip(marked, tokens, strict=True)
        self._original = {self._twin.token_to_id(m["content"]): int(t["id"]) for m, t in pairs}
        self._original[self._twin.token_to_id(AUDIO_MARK)] = AUDIO

    def mark(self, markup: str) -> str:
        """Replace the names of special tokens by their marks."""
        marked: str = self._special.sub(lambda found: self._marks[found[0]], markup)
        return marked

    def name(self, mark: str) -> str:
        """Return the special token that a mark stands for."""
        return self._names[mark]

    def encode(self, texts: Sequence[str]) -> list[MarkedIds]:
        """Encode marked texts."""
        return [
            MarkedIds([self._original.get(i, i) for i in found.ids], found.offsets)
            for found in self._twin.encode_batch(list(texts), add_special_tokens=False)
        ]


_AUDIO_TOKEN = {
    "content": AUDIO_MARK,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def check_text(text: str) -> str:
    """Return a text that holds no marks. Raises ValueError for one that does."""
    if found := _NONCHARACTERS.search(text):
        raise ValueError(f"expected text, got the noncharacter U+{ord(found[0]):04X} in it")
    return text


def _mark(number: int) -> str:
    return _START + "".join(chr(ord(_DIGITS) + int(d, 16)) for d in f"{number:x}") + _STOP


def _ids(tokens: Sequence[dict[str, Any]]) -> list[int]:
    return [int(token["id"]) for token in tokens]


def _renamed(model: dict[str, Any], marks: dict[str, str]) -> dict[str, Any]:
    """Rename special tokens in the model's vocabulary, so that no text is encoded as one."""
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):
        return {**model, "vocab": [[marks.get(piece, piece), score] for piece, score in vocabulary]}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
    # A name that text is merged to has to stay for the merges to be valid.
    merged = {"".join(pair) for pair in merges} | {part for pair in merges for part in pair}
    if model.get("unk_token") in marks:
        merged.add(model["unk_token"])
    names = {name: mark for name, mark in marks.items() if name not in merged}
    return {**model, "vocab": {names.get(piece, piece): i for piece, i in vocabulary.items()}}
