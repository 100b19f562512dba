"""Open a corpus that is larger than a window as parts of about 10,000 rows, none of them in memory.

Parts of an index folder stay the files that they are. Rows of manifests, which have been measured
and are in memory, are cut into parts of as many rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from omni.config import Config, SourceConfig
from omni.corpus.index import (
    INDEX_VERSION,
    SCHEMA,
    Index,
    check_rows,
    read_part,
    with_absolute_paths,
    without_text,
)
from omni.corpus.manifest import INDEX_FILE, absolute, manifest_path
from omni.corpus.other_files import without_other_files
from omni.corpus.rejects import Reject
from omni.errors import ManifestError
from omni.storage.digest import digest
from omni.storage.path import StoragePath, raise_if_unreachable

PART_ROWS = 10_000
"""Most rows of a part of a manifest; the parts of `omni index` have about as many."""
_PARTS_PER_WINDOW = 16
"""A window takes rows of at least so many parts of a manifest, which each epoch orders anew."""


@dataclass(frozen=True)
class CorpusPart:
    """One part of a training corpus: a file of an index folder, or rows of a manifest."""

    name: str
    """Name of the files that are made of the part."""
    source: int
    """Number of the source that it belongs to."""
    identity: str
    """Hash that changes with the rows of the part."""
    folder: StoragePath | None
    """Index folder of the file; None for rows of a manifest."""
    prompt: str
    """Prompt of rows that have none."""
    language: str | None
    """Language of rows that name none."""
    table: pa.Table | None = None
    """Rows of a manifest."""

    def read(self) -> Index:
        """Read the rows, as `omni.corpus.index.build_index` does for a whole index.

        Raises ManifestError for a damaged file.
        """
        if self.table is not None:
            return self._in_language(Index(self.table))
        assert self.folder is not None
        try:
            table = read_part(self.folder / "parts" / f"{self.name}.parquet").combine_chunks()
            check_rows(table)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise_if_unreachable(self.folder, error)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ManifestError(
                f"{self.folder}: the index is damaged: part {self.name}: {reason}"
            ) from None
        table = with_absolute_paths(table, self.folder, self.prompt)
        spoken = pc.not_equal(table["text"], "")
        rejects = without_text(table.filter(pc.invert(spoken)))
        return self._in_language(Index(table.filter(spoken).combine_chunks(), rejects))

    def _in_language(self, index: Index) -> Index:
        if self.language is None:
            return index
        at = index.table.schema.get_field_index("language")
        filled = index.table["language"].fill_null(self.language)
        return replace(index, table=index.table.set_column(at, "language", filled))


@dataclass(frozen=True)
class PartedCorpus:
    """A training corpus as parts."""

    parts: list[CorpusPart]
    weights: tuple[float, ...]
    """Occurrences in an epoch of each row of each source."""
    rows: int
    """Rows of all parts, as their indexes count them."""
    rejects: list[Reject] = field(default_factory=list)
    """Rows that are in no part."""
    notes: list[str] = field(default_factory=list)
    checked_ids: bool = True
    """No id occurs twice; False: ids of several sources have not been compared."""


def indexed_rows(sources: Sequence[str | SourceConfig]) -> int:
    """Count the rows of those sources that are index folders, from their `index.json`."""
    folders = [_index_folder(_entry(source).source) for source in sources]
    return sum(_about(folder).utterances for folder in folders if folder is not None)


def parts_of_index(
    index: Index, sources: Sequence[str | SourceConfig], config: Config
) -> PartedCorpus:
    """Cut an index that is in memory into parts. sources: all that it was built from, in order."""
    parts: list[CorpusPart] = []
    first = 0
    for number, rows in enumerate(index.sources):
        parts += _cut(index.table.slice(first, rows), number, config)
        first += rows
    weights = tuple(_entry(source).weight for source in sources)
    return PartedCorpus(parts, weights, len(index), index.rejects, index.notes)


def open_parts(
    sources: Sequence[str | SourceConfig], config: Config, others: dict[int, Index]
) -> PartedCorpus:
    """Open the sources as parts. others: indexes of those sources that are not index folders."""
    parts: list[CorpusPart] = []
    rejects: list[Reject] = []
    notes: list[str] = []
    rows = 0
    for number, source in enumerate(sources):
        entry = _entry(source)
        folder = _index_folder(entry.source)
        if folder is None:
            index = others[number]
            parts += _cut(index.table, number, config)
            rejects, notes = rejects + index.rejects, notes + index.notes
            rows += len(index)
            continue
        about = _about(folder)
        prompt = config.data.prompt if entry.prompt is None else entry.prompt
        parts += [
            CorpusPart(name, number, f"{about.identity} {name}", folder, prompt, entry.language)
            for name in about.parts
        ]
        rows += about.utterances
        found, told = without_other_files(about.rejects)
        rejects, notes = rejects + found, notes + told
    weights = tuple(_entry(source).weight for source in sources)
    return PartedCorpus(parts, weights, rows, rejects, notes, checked_ids=len(sources) == 1)


def is_index_folder(source: str | SourceConfig) -> bool:
    """Tell whether a source is the folder of an index that `omni index` has made."""
    return _index_folder(_entry(source).source) is not None


def _cut(table: pa.Table, source: int, config: Config) -> list[CorpusPart]:
    """Cut rows of a manifest into parts of equal size. Their prompts and languages are set."""
    size = min(PART_ROWS, max(1, config.data.window_utterances // _PARTS_PER_WINDOW))
    count = max(1, -(-len(table) // size))
    ends = [len(table) * n // count for n in range(count + 1)]
    parts = []
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        rows = table.slice(first, last - first)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_table(rows)
        identity = digest(sink.getvalue().to_pybytes())
        parts.append(CorpusPart(f"rows-{identity}", source, identity, None, "", None, rows))
    return parts


@dataclass(frozen=True)
class _About:
    """Content of an `index.json`, with the rejects beside it."""

    utterances: int
    parts: list[str]
    identity: str
    rejects: list[Reject]


def _about(folder: StoragePath) -> _About:
    """Read what an index folder says of itself. Raises ManifestError."""
    path = folder / INDEX_FILE
    try:
        text = path.read_bytes()
        about = json.loads(text)
        if about["version"] != INDEX_VERSION:
            raise ValueError(f"version {about['version']!r}, expected {INDEX_VERSION}")
        names = [Path(name).name for name in about["parts"]]
        with (folder / "rejects.jsonl").open("rb") as lines:
            rejects = [Reject(**json.loads(line)) for line in lines]
        # The file is written anew whenever a part has changed.
        status = path.stat()
        changed = getattr(status, "st_mtime_ns", None)
        identity = digest(str(folder), text, str(changed))
        return _About(int(about["utterances"]), names, identity, rejects)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_if_unreachable(folder, error)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ManifestError(f"{folder}: the index is damaged: {reason}") from None


def _index_folder(spec: str) -> StoragePath | None:
    """Return the index folder that a setting names; None for a corpus of another shape."""
    try:
        path = manifest_path(spec)
    except ManifestError:
        return None
    if path.name == INDEX_FILE and absolute(spec).name != INDEX_FILE:
        return path.parent
    return None


def _entry(source: str | SourceConfig) -> SourceConfig:
    return SourceConfig(source=source) if isinstance(source, str) else source
