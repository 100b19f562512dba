"""Mix corpora into one index, each with its weight, prompt and language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from omni.config import SourceConfig
from omni.corpus.index import Index, build_index, repeated_id
from omni.corpus.lengths import DURATION_TOLERANCE
from omni.errors import ManifestError
from omni.storage.http import DEFAULT_LIMITS, DownloadLimits
from omni.storage.path import StoragePath
from omni.storage.uri import public_uri


def build_mixture(
    sources: Sequence[str | SourceConfig],
    *,
    prompt: str = "",
    cache_dir: StoragePath | None = None,
    allow_absolute: bool = False,
    duration_tolerance: float = DURATION_TOLERANCE,
    downloads: DownloadLimits = DEFAULT_LIMITS,
    keep: Sequence[str] = (),
) -> Index:
    """Index the sources in order; plain paths alone give what `build_index` gives.

    Raises ManifestError as it does, also where one of the sources has no usable row.
    """
    paths = [source for source in sources if isinstance(source, str)]
    if len(paths) == len(sources):
        return build_index(
            paths,
            prompt=prompt,
            cache_dir=cache_dir,
            allow_absolute=allow_absolute,
            duration_tolerance=duration_tolerance,
            downloads=downloads,
            keep=keep,
        )
    parts, weights = [], []
    for source in sources:
        entry = SourceConfig(source=source) if isinstance(source, str) else source
        part = build_index(
            [entry.source],
            prompt=prompt if entry.prompt is None else entry.prompt,
            cache_dir=cache_dir,
            allow_absolute=allow_absolute,
            duration_tolerance=duration_tolerance,
            downloads=downloads,
            keep=keep,
        )
        parts.append(_in_language(part, entry.language))
        weights.append(np.full(len(part), entry.weight))
    table = pa.concat_tables([part.table for part in parts]).combine_chunks()
    if (twice := repeated_id(table["id"])) is not None:
        raise ManifestError(
            f"{', '.join(map(public_uri, names_of(sources)))}: the id {twice!r} occurs twice"
        )
    joined = np.concatenate(weights)
    return Index(
        table,
        [reject for part in parts for reject in part.rejects],
        None if (joined == 1).all() else joined,
        [note for part in parts for note in part.notes],
        tuple(map(len, parts)),
    )


def names_of(sources: Sequence[str | SourceConfig]) -> list[str]:
    """Return the manifests of the sources."""
    return [source if isinstance(source, str) else source.source for source in sources]


def _in_language(index: Index, language: str | None) -> Index:
    """Fill in the language of rows without one."""
    if language is None:
        return index
    at = index.table.schema.get_field_index("language")
    filled = index.table["language"].fill_null(language)
    return replace(index, table=index.table.set_column(at, "language", filled))
