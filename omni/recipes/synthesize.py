"""Synthesize English speech from WordNet's sentences: tar shards with sources and licences."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import soxr
from filelock import FileLock, Timeout

from omni.errors import ConfigError, counted
from omni.recipes.exclusion import HELD_OUT, Exclusion, read_texts
from omni.recipes.notices import licences, readme
from omni.recipes.shards import UTTERANCES, Order, ShardStats, make_shards
from omni.recipes.takes import check_mixture, order_of
from omni.recipes.voices import missing, version_of
from omni.recipes.wordnet import read_glosses, select_sentences
from omni.storage.atomic import write_atomic
from omni.storage.digest import digest

WORDNET = Path("/usr/share/wordnet")
_FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """Hold what determines the bytes of the shards.

    exclude: corpora whose texts are left out, besides HELD_OUT. per_shard: utterances.
    """

    seed: int
    mixture: Mapping[str, float]
    wordnet: Path = WORDNET
    exclude: Sequence[str] = ()
    per_shard: int = UTTERANCES

    def facts(self) -> dict[str, Any]:
        """Return what must stay the same when an interrupted job continues."""
        versions = {name: version_of(name) for name in sorted(self.mixture)}
        versions |= {"soxr": soxr.__version__, "libsndfile": soundfile.__libsndfile_version__}
        return {
            "format": _FORMAT,
            "seed": self.seed,
            "mixture": dict(sorted(self.mixture.items())),
            "utterances_per_shard": self.per_shard,
            "exclude": [*HELD_OUT, *sorted(set(self.exclude))],
            "versions": versions,
        }


def synthesize(
    recipe: Recipe, out: Path, hours: float, processes: int, say: Callable[[str], None]
) -> ShardStats:
    """Make shards of at least `hours` hours in the folder `out`, or continue to make them.

    Raises ConfigError for a missing program or source, and for a folder made by another recipe.
    """
    try:
        check_mixture(recipe.mixture)
    except ValueError as error:
        raise ConfigError(f"--mixture: {error}") from None
    if absent := missing(recipe.mixture):
        rest = [f"{n}={share:g}" for n, share in recipe.mixture.items() if n not in absent]
        hint = f"; --mixture {','.join(rest)} goes without" if rest else ""
        raise ConfigError(f"--mixture: {'; '.join(absent.values())}{hint}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            return _make(recipe, out, hours, processes, say)
    except Timeout:
        raise ConfigError(f"--out: another job is writing {out}") from None


def _make(
    recipe: Recipe, out: Path, hours: float, processes: int, say: Callable[[str], None]
) -> ShardStats:
    texts, facts = _prepare(recipe, out, say)

    def order_of_shard(number: int) -> Order:
        numbers = range(number * recipe.per_shard, (number + 1) * recipe.per_shard)
        chosen = [(n, texts[order_of(len(texts), recipe.seed, n)]) for n in numbers]
        return Order(number, recipe.seed, dict(recipe.mixture), chosen)

    total, began, new_seconds = ShardStats(), time.monotonic(), 0.0
    shards = 0
    for number, stats, is_new in make_shards(order_of_shard, out, hours * 3600, processes):
        total.add(stats)
        shards = number + 1
        if is_new:
            new_seconds += stats.seconds
            rate = new_seconds / (time.monotonic() - began)
            left = max(0.0, hours * 3600 - total.seconds) / rate / 60
            say(
                f"shard {number}: {total.seconds / 3600:.2f} of {hours:g} h, "
                f"{rate:.0f} x real time, {left:.0f} min left"
            )
    passes = shards * recipe.per_shard / len(texts)
    write_atomic(out / "LICENSES", licences(recipe.wordnet, recipe.mixture).encode())
    write_atomic(out / "README.md", readme(facts, total, shards, passes).encode())
    return total


def _prepare(
    recipe: Recipe, out: Path, say: Callable[[str], None]
) -> tuple[list[str], dict[str, Any]]:
    """Return sentences and facts; those of an existing folder must be of the same recipe."""
    about, listed = out / "recipe.json", out / "sentences.txt"
    facts = recipe.facts()
    if about.is_file():
        known = json.loads(about.read_bytes())
        for name, value in facts.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"--out: {out} was made with {name} {known.get(name)}, this is {value}: "
                    "choose another folder"
                )
        texts = listed.read_text("utf-8").split("\n")
        if digest("\n".join(texts)) != known["sentences_digest"]:
            raise ConfigError(f"--out: {listed} was changed: choose another folder")
        return texts, known
    exclusion = Exclusion(read_texts(facts["exclude"]))
    found = select_sentences(read_glosses(recipe.wordnet), exclusion)
    if not found.texts:
        raise ConfigError(f"--wordnet: no sentence in {recipe.wordnet} can be used")
    say(f"{counted(len(found.texts), 'sentence')} of WordNet; left out: {_listed(found.left_out)}")
    say(f"compared with {counted(exclusion.count, 'text')} of {', '.join(facts['exclude'])}")
    joined = "\n".join(found.texts)
    facts |= {
        "sentences": len(found.texts),
        "sentences_digest": digest(joined),
        "left_out": dict(found.left_out),
        "held_out_texts": exclusion.count,
    }
    write_atomic(listed, joined.encode())
    write_atomic(about, (json.dumps(facts, indent=1) + "\n").encode())
    return found.texts, facts


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common()) or "none"


def parse_mixture(text: str) -> dict[str, float]:
    """Parse `hibari=4,flite=3`. Raises ValueError."""
    parts = [part.partition("=") for part in text.split(",")]
    mixture = {name.strip(): float(share) for name, _, share in parts}
    check_mixture(mixture)
    return mixture
