"""Prepare a corpus that is larger than a window: its parts in parallel, once for all runs.

The parts are kept beside their index, or in the cache's folder where that cannot be written and for
rows of manifests. Their totals are kept in one file, so that a second start reads nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context

import numpy as np
import pyarrow as pa

from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.languages import unknown_languages
from omni.corpus.parts import CorpusPart, PartedCorpus
from omni.corpus.rejects import Reject
from omni.errors import ManifestError
from omni.plan.part_files import PartFacts, PartFiles, all_there, facts_of, parts_of
from omni.run.prepared_part import Recipe, prepare_part, read_with_text
from omni.storage.atomic import write_atomic
from omni.storage.digest import digest
from omni.storage.path import StoragePath, register_credentials

_FOLDER = "prepared"
_SAMPLED_ROWS = 200_000
"""Rows, of parts drawn by the seed, that a tokenizer is trained on."""
_FEW = 2
"""So many parts are prepared in this process: starting others takes longer."""
_PROGRESS_SECONDS = 10.0
_HASHES = 1 << 26
"""Hashes of ids that are compared at a time, in 0.5 GB."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A large corpus whose parts have been prepared."""

    facts: list[PartFacts]
    weights: tuple[float, ...]
    rejects: list[Reject]
    notes: list[str]
    summary: StoragePath
    """File with the totals of all parts."""
    joined: dict[str, list[int]] = field(default_factory=dict)
    """Hashes of held-out sentences in the corpus, by the hash of all that were looked for."""

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.facts)

    @property
    def samples(self) -> int:
        return sum(part.samples for part in self.facts)

    @property
    def fingerprint(self) -> str:
        return digest("parts", *(part.content for part in self.facts))

    @property
    def tokens(self) -> str:
        return digest("parts", *(part.tokens for part in self.facts))

    @property
    def tasks(self) -> set[str]:
        return {task for part in self.facts for task in part.tasks}

    def files(self, config: Config, tasks: Sequence[str]) -> PartFiles:
        """Open the files of the parts. tasks: names of the tasks of the run."""
        speeds = config.augment.speed
        parts = parts_of(self.facts, self.weights)
        return PartFiles(
            [part.path for part in self.facts],
            parts.starts,
            seed=config.run.seed,
            speeds=None if speeds == [1.0] else tuple(speeds),
            tasks=tasks,
        )


def read_sample(corpus: PartedCorpus, config: Config) -> Index:
    """Read some parts, drawn by the seed, as an index that stands for the whole corpus."""
    register_credentials(config.locations)
    order = np.random.default_rng(config.run.seed).permutation(len(corpus.parts))
    tables, rows = [], 0
    for number in order.tolist():
        index = read_with_text(corpus.parts[number], config)
        tables.append(index.table)
        rows += len(index)
        if rows >= _SAMPLED_ROWS:
            break
    return Index(pa.concat_tables(tables).combine_chunks())


def prepare_corpus(
    corpus: PartedCorpus, recipe: Recipe, say: Callable[[str], None] | None = None
) -> PreparedCorpus:
    """Prepare all parts that have not been prepared yet. say: reports progress.

    Raises ConfigError naming a row or a setting, ManifestError for a damaged or repeated part.
    """
    config = recipe.config
    home = (config.run_dir if config.cache_dir is None else config.cache_dir) / _FOLDER
    names = [recipe.name_of(part) for part in corpus.parts]
    summary = home / f"{digest(*names, repr(corpus.weights))}.json"
    known = _read_summary(summary, len(names))
    if known is not None:
        facts, joined = known
    else:
        folders = _folders(corpus.parts, home)
        facts, joined = list(_prepare_all(corpus, recipe, folders, say)), {}
    prepared = PreparedCorpus(
        facts,
        corpus.weights,
        corpus.rejects + [Reject(**reject) for part in facts for reject in part.rejects],
        corpus.notes + _notes(facts),
        summary,
        joined,
    )
    if known is None:
        if not corpus.checked_ids:
            _check_ids(prepared, config)
        _write_summary(prepared)
    return prepared


def known_sentences(prepared: PreparedCorpus, sentences: np.ndarray, config: Config) -> np.ndarray:
    """Tell which sentences also occur in the corpus: (n,) booleans.

    sentences: (n,) hashes, see `omni.run.prepared_part.sentence_hashes`. A hash join, part by part;
    what it finds is kept with the totals.
    """
    asked = np.unique(sentences)
    key = digest(asked.tobytes())
    if key not in prepared.joined:
        files = prepared.files(config, ())
        found = np.zeros(len(asked), bool)
        for part in range(len(files)):
            found |= np.isin(asked, files.hashes(part, "sentence"))
        prepared.joined[key] = asked[found].tolist()
        _write_summary(prepared)
    return np.isin(sentences, np.asarray(prepared.joined[key], np.uint64))


def _prepare_all(
    corpus: PartedCorpus,
    recipe: Recipe,
    folders: list[StoragePath],
    say: Callable[[str], None] | None,
) -> Iterator[PartFacts]:
    """Prepare the parts in processes of their own; yield their totals in order."""
    processes = min(len(os.sched_getaffinity(0)), len(corpus.parts))
    jobs = zip(corpus.parts, folders, strict=True)
    if len(corpus.parts) <= _FEW or processes == 1:
        yield from (prepare_part(part, recipe, folder) for part, folder in jobs)
        return
    numbered = enumerate(jobs)
    done: dict[int, PartFacts] = {}
    began = shown = time.monotonic()
    rows = following = 0
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (recipe,)) as pool:
        waiting: dict[Future[PartFacts], int] = {}

        def submit(count: int) -> None:
            for number, (part, folder) in islice(numbered, count):
                waiting[pool.submit(_prepare, part, folder)] = number

        submit(2 * processes)
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    done[waiting.pop(future)] = facts = future.result()
                    rows += facts.rows
                    submit(1)
                while following in done:
                    yield done.pop(following)
                    following += 1
                now = time.monotonic()
                if say is not None and now - shown > _PROGRESS_SECONDS:
                    shown = now
                    rate = rows / (now - began)
                    say(
                        f"  preparing: {rows:,} of {corpus.rows:,} utterances, {rate:,.0f}/s by "
                        f"{processes} processes"
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_recipe: Recipe | None = None


def _begin(recipe: Recipe) -> None:
    """Set up a process that prepares parts."""
    global _recipe
    # The other cores have processes of their own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    register_credentials(recipe.config.locations)
    _recipe = recipe


def _prepare(part: CorpusPart, folder: StoragePath) -> PartFacts:
    assert _recipe is not None
    return prepare_part(part, _recipe, folder)


def _folders(parts: Sequence[CorpusPart], home: StoragePath) -> list[StoragePath]:
    """Choose the folder of each part: beside its index, or `home` where that cannot be written."""
    chosen: dict[StoragePath, StoragePath] = {}
    folders = []
    for part in parts:
        if part.folder is None:
            folders.append(home)
            continue
        if part.folder not in chosen:
            chosen[part.folder] = _writable(part.folder / _FOLDER) or home
        folders.append(chosen[part.folder])
    return folders


def _writable(folder: StoragePath) -> StoragePath | None:
    """Create a folder and return it; None where nothing can be written into it."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return None
    return folder


def _read_summary(
    path: StoragePath, parts: int
) -> tuple[list[PartFacts], dict[str, list[int]]] | None:
    """Read the totals of all parts; None if they are not there, or damaged."""
    try:
        kept = json.loads(path.read_bytes())
        facts = [facts_of(values) for values in kept["parts"]]
        joined = {str(key): [int(n) for n in found] for key, found in kept["joined"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = len(facts) == parts and all_there([part.path for part in facts])
    return (facts, joined) if whole else None


def _write_summary(prepared: PreparedCorpus) -> None:
    prepared.summary.parent.mkdir(parents=True, exist_ok=True)
    kept = {"parts": [asdict(part) for part in prepared.facts], "joined": prepared.joined}
    write_atomic(prepared.summary, json.dumps(kept).encode())


def _notes(facts: Sequence[PartFacts]) -> list[str]:
    """Return notes on the languages of all parts."""
    languages: Counter[str | None] = Counter()
    for part in facts:
        languages.update({name or None: count for name, count in part.languages.items()})
    return unknown_languages(languages)


def _check_ids(prepared: PreparedCorpus, config: Config) -> None:
    """Raise ManifestError for an id that occurs twice, of which each source has been cleared."""
    files = prepared.files(config, ())
    rounds = max(1, -(-prepared.rows // _HASHES))
    for turn in range(rounds):
        hashes: list[np.ndarray] = []
        for part in range(len(files)):
            found = files.hashes(part, "identity")
            hashes.append(found[found % np.uint64(rounds) == turn])
        joined = np.sort(np.concatenate(hashes))
        repeated = joined[1:][joined[1:] == joined[:-1]]
        if len(repeated):
            _raise_repeated(files, repeated[0])


def _raise_repeated(files: PartFiles, value: np.uint64) -> None:
    """Raise ManifestError if two ids of this hash are the same."""
    ids: list[str] = []
    for part in range(len(files)):
        at = np.flatnonzero(files.hashes(part, "identity") == value)
        ids += files.ids([int(n) + files.start(part) for n in at])
    if len(set(ids)) < len(ids):
        raise ManifestError(f"data.train: the id {ids[0]!r} occurs twice")
