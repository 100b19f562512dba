"""Normalise the text of a corpus: Unicode form, case, punctuation, language tag.

Pure functions of text and settings (`data.unicode` to `data.language_tag`), applied once to the
rows of an index: plan, tokenizer, fingerprints and references follow from what they return.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import regex

from omni.corpus.index import Index
from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.languages import language_code
from omni.corpus.messages import messages_json, messages_of
from omni.corpus.rejects import Reject
from omni.model.chat_template import Message

# Scripts that are written without spaces between words, for `regex`. The prolonged sound mark of
# kana belongs to no script.
UNSPACED_SCRIPTS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\u30fc"
)
_SPOKEN = "%‰&@#§"  # Unicode counts them as punctuation; people read them aloud.
_JOINED = regex.compile(
    rf"(?<=[{UNSPACED_SCRIPTS}]\p{{M}}*)[^\P{{P}}{_SPOKEN}]+(?=[{UNSPACED_SCRIPTS}])"
)
# In a word: apostrophes, hyphens, the Catalan dot, geresh, tsheg. In a number: its separators.
_PUNCTUATION = regex.compile(
    r"(?<=[\p{L}\p{M}\p{N}])['’ʼ‐‑\-·׳״་](?=[\p{L}\p{N}])|(?<=\p{N})[.,:/٫٬](?=\p{N})"
    rf"|[{_SPOKEN}]|(\p{{P}})"
)
_NO_SPACE = regex.compile(
    rf"[{UNSPACED_SCRIPTS}][\p{{M}}\p{{P}}]*\n|\n[{UNSPACED_SCRIPTS}]"
)  # where two texts meet
_CODE = regex.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class TextPolicy:
    """Settings of text normalisation.

    language: default for rows without one. prompts: by task, for rows without a prompt.
    """

    unicode: Literal["NFC", "NFKC", "none"] = "none"
    case: Literal["keep", "lower", "upper"] = "keep"
    punctuation: Literal["keep", "strip"] = "keep"
    language: str | None = None
    language_tag: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> TextPolicy:
        """Read the policy from the `data` section of a config; old checkpoints lack some fields."""
        names = ("unicode", "case", "punctuation", "language", "language_tag")
        prompts = {name: task["prompt"] for name, task in (data.get("tasks") or {}).items()}
        return cls(**{name: data[name] for name in names if name in data}, prompts=prompts)

    def form(self, text: str) -> str:
        """Convert text to the policy's Unicode form."""
        return text if self.unicode == "none" else unicodedata.normalize(self.unicode, text)

    def transcript(self, text: str, language: str | None = None) -> str:
        """Normalise a transcript to the text that the model learns to write."""
        text = self.form(text)
        if self.punctuation == "strip":
            text = " ".join(_PUNCTUATION.sub(_without, _JOINED.sub("", text)).split())
        turkic = language is not None and language_code(language) in ("tr", "az")
        if self.case == "lower":
            text = (text.replace("I", "ı").replace("İ", "i") if turkic else text).lower()
        elif self.case == "upper":
            text = (text.replace("i", "İ") if turkic else text).upper()
        return self.form(text)  # Changing case can undo the form: ǰ has no capital of its own.

    def prompt(self, prompt: str, language: str | None) -> str:
        """Normalise a prompt, and append `lang:fr` where language tags are on.

        Raises ValueError for a language that is not a code.
        """
        prompt = self.form(prompt)
        if not self.language_tag or not language:
            return prompt
        code = language.strip().lower().replace("_", "-")
        if not _CODE.fullmatch(code):
            raise ValueError(f"expected a language's code as fr or zh-TW, got {language!r}")
        return f"{prompt} lang:{code}".lstrip()


def join(texts: Sequence[str]) -> str:
    """Join consecutive texts, with a space where their script uses spaces."""
    joined = ""
    for text in texts:
        joined += (
            " " if joined and not _NO_SPACE.search(f"{joined[-8:]}\n{text[:1]}") else ""
        ) + text
    return joined


def _without(found: regex.Match[str]) -> str:
    return " " if found[1] else found[0]


def apply_policy(index: Index, policy: TextPolicy) -> Index:
    """Normalise all text of an index; rows without text afterwards become rejects.

    Transcripts get the whole policy; conversations and rows of other tasks, whose answers are not
    what is said, get the Unicode form only. Raises ValueError naming a row with a wrong language.
    """
    if _untouched(index, policy):
        return index
    rows = index.table.to_pylist()
    empty = [i for i, row in enumerate(rows) if not _apply(row, policy)]
    table = pa.Table.from_pylist(rows, index.table.schema)
    if not empty:
        return replace(index, table=table)
    kept = np.delete(np.arange(len(rows)), empty)
    why = f"nothing is left of the text under data.punctuation: {policy.punctuation}"
    rejects = [Reject(rows[i]["id"], rows[i]["uri"], "empty text", why) for i in empty]
    weights = None if index.weights is None else index.weights[kept]
    return Index(table.take(kept), index.rejects + rejects, weights, index.notes)


def _untouched(index: Index, policy: TextPolicy) -> bool:
    """Check for the usual case: all text has its form already, and nothing else is asked for."""
    if (policy.case, policy.punctuation) != ("keep", "keep") or policy.language_tag:
        return False
    if policy.language is not None and index.table["language"].null_count:
        return False
    if policy.unicode == "none":
        return True
    columns = [index.table[name].to_pylist() for name in ("text", "prompt")]
    return index.table["messages"].null_count == len(index) and all(
        unicodedata.is_normalized(policy.unicode, text or "") for text in chain(*columns)
    )


def _apply(row: dict[str, Any], policy: TextPolicy) -> bool:
    """Normalise a row in place; return whether it still has text."""
    language = row["language"] = row["language"] or policy.language
    if row["messages"] is not None:
        said = [
            Message(m.role, tuple(policy.form(p) if isinstance(p, str) else p for p in m.parts))
            for m in messages_of(row)
        ]
        row["messages"], row["text"] = messages_json(said), policy.form(row["text"])
        for part in row["audios"]:
            part["text"] = None if part["text"] is None else policy.form(part["text"])
        return True
    spoken = row["task"] in (None, DEFAULT_TASK)
    row["text"] = policy.transcript(row["text"], language) if spoken else policy.form(row["text"])
    prompt = row["prompt"]
    if policy.language_tag and not prompt:
        prompt = policy.prompts.get(row["task"] or DEFAULT_TASK, "")
    try:
        row["prompt"] = policy.prompt(prompt, language)
    except ValueError as error:
        raise ValueError(f"{row['id']}: {error}") from None
    return bool(row["text"])
