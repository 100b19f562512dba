"""Prepare one part of a large corpus: text policy, token ids, positions, totals.

What is made of a part is kept, and found again under a name that changes with its rows and with
all that they are made with.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omni.augment.speed import Speeds, names_of
from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.parts import CorpusPart
from omni.corpus.text import TextPolicy, apply_policy
from omni.errors import ConfigError
from omni.metrics.score import normalize
from omni.model.chat_template import Kind, Template
from omni.model.tokenizer import SpeechTokenizer
from omni.plan.part_files import PartFacts, lengths_digest, read_facts, write_part
from omni.plan.sequences import answer_lengths, ctc_fit, token_fingerprint, with_tokens
from omni.run.augmentation import speeds_of
from omni.storage.digest import digest
from omni.storage.path import StoragePath

_VERSION = 1
"""Part of the fingerprint: to be raised when other rows are made of the same input."""


@dataclass(frozen=True)
class Recipe:
    """All that the rows of a prepared part are made with."""

    config: Config
    tokenizer_json: str
    template: Kind

    @functools.cached_property
    def fingerprint(self) -> str:
        config, optim = self.config, self.config.optim
        policy = asdict(TextPolicy.of(config.data.model_dump()))
        settings = {
            "version": _VERSION,
            "policy": {**policy, "prompts": dict(policy["prompts"])},
            "mode": config.encoder.mode,
            "stack": config.model.stack,
            "summary_tokens": config.model.summary_tokens,
            "bin_positions": optim.bin_positions,
            "transcripts": bool(optim.kl_weight or optim.ctc_weight),
            "distillation": bool(optim.kl_weight),
            "ctc": bool(optim.ctc_weight),
            "speed": config.augment.speed,
            "template": self.template,
        }
        return digest(json.dumps(settings, sort_keys=True), self.tokenizer_json)

    def name_of(self, part: CorpusPart) -> str:
        """Name the file of a prepared part."""
        given = repr((part.identity, part.source, part.prompt, part.language, self.fingerprint))
        return f"{part.name}-{digest(given, size=6)}.parquet"


def prepare_part(part: CorpusPart, recipe: Recipe, folder: StoragePath) -> PartFacts:
    """Prepare a part, unless it has been prepared before; return its totals.

    Raises ConfigError naming a row that cannot be used at all, and ManifestError for a damaged
    part.
    """
    path = folder / recipe.name_of(part)
    facts = read_facts(path)
    if facts is None:
        table, facts = _make(part, recipe, str(path))
        write_part(path, table, facts)
    return replace(facts, path=str(path), source=part.source)


def read_with_text(part: CorpusPart, config: Config) -> Index:
    """Read a part and apply the text policy.

    Raises ConfigError for a language that has no tag, and ManifestError for a damaged part.
    """
    index = part.read()
    try:
        return apply_policy(index, TextPolicy.of(config.data.model_dump()))
    except ValueError as error:
        raise ConfigError(f"data.language_tag: {error}") from None


def _make(part: CorpusPart, recipe: Recipe, path: str) -> tuple[pa.Table, PartFacts]:
    config = recipe.config
    index = read_with_text(part, config)
    tasks = sorted({task or DEFAULT_TASK for task in index.table["task"].unique().to_pylist()})
    template = _template(recipe.tokenizer_json, recipe.template)
    table, lengths, too_long = with_tokens(index, template, tasks, config)
    names = names_of(table["key"].to_pylist())
    speeds: Speeds | None = None
    if config.augment.speed != [1.0]:
        speeds = speeds_of(config, table, lengths)
    shortest = lengths if speeds is None else speeds.shortest
    silent, beyond = (
        ctc_fit(table, shortest, config.model.summary_tokens) if config.optim.ctc_weight else (0, 0)
    )
    usable = lengths > 0
    counts = pc.value_counts(index.table["language"].combine_chunks()).to_pylist()
    languages = Counter({str(c["values"] or ""): int(c["counts"]) for c in counts})
    facts = PartFacts(
        path=path,
        source=part.source,
        rows=len(table),
        usable=int(usable.sum()),
        positions=int(lengths.sum()),
        samples=int(pc.sum(table["samples"]).as_py() or 0),
        lengths=lengths_digest(lengths, None if speeds is None else speeds.positions, names),
        content=index.fingerprint,
        tokens=token_fingerprint(table),
        longest_answer=int(answer_lengths(table)[usable].max(initial=0)) if len(table) else 0,
        silent=silent,
        beyond=beyond,
        tasks=tasks,
        languages=dict(languages),
        rejects=[reject.to_dict() for reject in index.rejects + too_long],
    )
    table = table.drop_columns(["task_number"])
    table = table.append_column("positions", pa.array(lengths, pa.int32()))
    if speeds is not None:
        for number, positions in enumerate(speeds.positions):
            table = table.append_column(f"positions_{number}", pa.array(positions, pa.int32()))
        table = table.append_column("name", pa.array(names, pa.uint64()))
    table = table.append_column("sentence", pa.array(sentence_hashes(table["text"])))
    table = table.append_column("identity", pa.array(names_of(table["id"].to_pylist())))
    return table, facts


def sentence_hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """Hash texts without case and punctuation: (n,) uint64."""
    return names_of([plain_sentence(text) for text in texts.to_pylist()])


# Whisper's normalizer puts a space in the place of these.
_ASCII_SIGNS = str.maketrans(
    {c: " " for c in map(chr, range(128)) if unicodedata.category(c)[0] in "SP"}
)


def plain_sentence(text: str) -> str:
    """Normalize a text as `omni.metrics.score.normalize` does, faster where it is plain ASCII."""
    if text.isascii() and not any(bracket in text for bracket in "<[("):
        return " ".join(text.lower().translate(_ASCII_SIGNS).split())
    # The English normalizer takes "zero" and the letter "o" for one word.
    return normalize(text, language="")


@functools.lru_cache(maxsize=1)
def _template(tokenizer_json: str, kind: Kind) -> Template:
    """Build the template once for all parts of a process."""
    return Template(SpeechTokenizer.from_json(tokenizer_json), kind)
