"""Index a corpus: one row per utterance with all that the plan needs before audio is decoded.

Sample counts come from the structure of the audio files, read in parallel and kept between runs. A
manifest's `duration` is not used for them, because the plan reserves positions by sample count; a
recording that is clearly shorter is rejected.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from omni.audio.windows import SAMPLES_PER_HOUR
from omni.corpus.languages import unknown_languages
from omni.corpus.lengths import DURATION_TOLERANCE, measure_all
from omni.corpus.manifest import INDEX_FILE, absolute, manifest_path, read_manifest
from omni.corpus.other_files import without_other_files
from omni.corpus.rejects import Reject
from omni.corpus.sources import Options, format_of
from omni.errors import ManifestError
from omni.storage.digest import digest
from omni.storage.http import DEFAULT_LIMITS, DownloadLimits
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, open_ranges, raise_if_unreachable
from omni.storage.uri import public_uri

INDEX_VERSION = 1
_BATCH = 65_536  # rows converted to Python objects at a time
# Large types: 30 million rows have more than 2 GiB of paths, which overflow offsets of 32 bits.
_LOCATION = [
    ("uri", pa.large_string()),
    ("offset", pa.int64()),  # bytes into an archive; null: the file is the recording
    ("length", pa.int64()),
    ("start", pa.float64()),  # seconds into the recording
    ("duration", pa.float64()),  # seconds; null: to the end
    ("samples", pa.int64()),  # at 16 kHz
    ("key", pa.large_string()),  # content hash, the name in the feature cache
]

SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        *_LOCATION,
        ("text", pa.large_string()),
        ("prompt", pa.large_string()),
        ("language", pa.large_string()),
        ("speaker", pa.large_string()),
        ("task", pa.large_string()),
        # Conversations only. `samples` is then the sum over `audios`, `key` one key for all of
        # them, `text` the last answer.
        ("messages", pa.large_string()),  # JSON, see omni.corpus.messages
        ("audios", pa.large_list(pa.struct([*_LOCATION, ("text", pa.large_string())]))),
        ("labels", pa.large_string()),  # JSON object, see omni.corpus.labels
    ]
)


@dataclass(frozen=True)
class Index:
    table: pa.Table  # of SCHEMA, in one chunk
    rejects: list[Reject] = field(default_factory=list)
    weights: np.ndarray | None = None  # (n,) occurrences in an epoch; None: one each
    notes: list[str] = field(default_factory=list)  # what a user should know of it
    sources: tuple[int, ...] = ()  # rows of each source, in order, before the text policy

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def hours(self) -> float:
        return int(pc.sum(self.table["samples"]).as_py() or 0) / SAMPLES_PER_HOUR

    @property
    def fingerprint(self) -> str:
        """Hash content, length, text and order of the utterances, but no paths."""
        state = hashlib.blake2b(digest_size=12)
        for name in ("key", "samples", "text", "prompt", "task", "messages"):
            column = self.table[name]
            if name in ("task", "messages") and column.null_count == len(column):
                continue
            state.update(b"[")  # The repr of one list, made batch by batch to save memory.
            for number, batch in enumerate(self.table.select([name]).to_batches(_BATCH)):
                items = repr(batch[0].to_pylist())[1:-1]
                state.update(f"{', ' if number else ''}{items}".encode())
            state.update(b"]")
        return state.hexdigest()


def build_index(
    specs: Sequence[str],
    *,
    prompt: str = "",
    cache_dir: StoragePath | None = None,
    threads: int = 8,
    allow_absolute: bool = False,
    duration_tolerance: float = DURATION_TOLERANCE,
    downloads: DownloadLimits = DEFAULT_LIMITS,
    keep: Sequence[str] = (),
) -> Index:
    """Index manifests, tar shards, index folders and small corpora of any shape, in order.

    Rows with bad audio or without text become rejects; so do recordings that lack more than the
    share `duration_tolerance` of the duration in the manifest. A manifest may name files in its own
    folder only, unless `allow_absolute`: its author may not be allowed to read all files of this
    machine. downloads: limits for recordings that rows name on web servers. keep: columns that
    become labels; an index folder keeps those that it was made with.
    Raises ManifestError for a missing manifest, a malformed row, a repeated id, or no usable row.
    """
    tables: list[pa.Table] = []
    rejects: list[Reject] = []
    names = ", ".join(map(public_uri, specs))
    for spec in specs:
        path = _find_manifest(spec)
        if path is None:
            options = Options(allow_absolute=allow_absolute, downloads=downloads, keep=tuple(keep))
            path = _index_small(spec, cache_dir, options) / INDEX_FILE
        if path.name == INDEX_FILE and absolute(spec).name != INDEX_FILE:
            table, bad = read_index_folder(path.parent, prompt)
            spoken = pc.not_equal(table["text"], "")
            rejects += without_text(table.filter(pc.invert(spoken))) + bad
            tables.append(table.filter(spoken))
            continue
        parsed = list(read_manifest(path, prompt, allow_absolute, keep))
        unusable = [row for row in parsed if isinstance(row, Reject)]
        rows = [row for row in parsed if not isinstance(row, Reject)]
        if not parsed:
            raise ManifestError(f"{public_uri(spec)}: the manifest has no rows")
        good, bad = measure_all(rows, path, cache_dir, threads, duration_tolerance)
        tables.append(pa.Table.from_pylist(good, SCHEMA))
        rejects += unusable + bad
    # Each bin takes rows of the table, and of many chunks each `take` would copy whole columns.
    table = pa.concat_tables(tables).combine_chunks()
    rejects, notes = without_other_files(rejects)
    if not len(table) and not rejects:
        raise ManifestError(f"{names}: there are no utterances; {'; '.join(notes)}")
    if not len(table):
        first = rejects[0]
        raise ManifestError(
            f"{names}: all {len(rejects)} rows were rejected; "
            f"the first, {first.id}: {first.reason}: {first.detail}"
        )
    if (repeated := repeated_id(table["id"])) is not None:
        raise ManifestError(f"{names}: the id {repeated!r} occurs twice")
    return Index(table, rejects, notes=notes, sources=tuple(map(len, tables)))


def _find_manifest(spec: str) -> StoragePath | None:
    """Find a manifest, tar or index; None for a corpus of another shape. Raises ManifestError."""
    try:
        path = manifest_path(spec)
    except ManifestError:
        if format_of(spec) in (None, "jsonl"):
            raise
        return None
    return None if path.name.endswith((".gz", ".csv", ".tsv", ".parquet")) else path


def _index_small(spec: str, cache_dir: StoragePath | None, options: Options) -> StoragePath:
    """Index a small corpus of any shape beside the cache, or for this process alone without one.

    Returns the index folder. Raises ManifestError.
    """
    from omni.corpus.build import index_few

    if cache_dir is None:
        name = tempfile.mkdtemp(prefix="omni-index-")
        atexit.register(shutil.rmtree, name, ignore_errors=True)
        folder: StoragePath = Path(name)
    else:
        identity = f"{Path.cwd()} {spec} {options.allow_absolute}"
        if options.keep:
            identity += f" {options.keep}"
        folder = cache_dir / "indexes" / digest(identity, size=8)
    index_few(spec, folder, options)
    return folder


def notes_of(index: Index) -> list[str]:
    """Return an index's notes, with one on languages that nothing is known of."""
    counts = pc.value_counts(index.table["language"].combine_chunks()).to_pylist()
    return index.notes + unknown_languages({c["values"]: c["counts"] for c in counts})


def repeated_id(ids: pa.ChunkedArray) -> str | None:
    """Return the first id that occurs more than once."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return None
    counts = pc.value_counts(ids)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return str(twice[0])


def without_text(table: pa.Table) -> list[Reject]:
    """Describe rows without a transcript, which training leaves out."""
    detail = "nothing to learn from; `omni transcribe` can write it down first"
    rows = zip(table["id"].to_pylist(), table["uri"].to_pylist(), strict=True)
    return [Reject(name, uri, "no text", detail) for name, uri in rows]


def read_index_folder(folder: StoragePath, prompt: str = "") -> tuple[pa.Table, list[Reject]]:
    """Read an index folder: its rows (SCHEMA, paths made absolute) and its rejects.

    Rows without a transcript have an empty text. Raises ManifestError.
    """
    try:
        about = json.loads((folder / INDEX_FILE).read_bytes())
        if about["version"] != INDEX_VERSION:
            raise ValueError(f"version {about['version']!r}, expected {INDEX_VERSION}")
        files = [folder / "parts" / f"{Path(name).name}.parquet" for name in about["parts"]]
        table = pa.concat_tables(
            [SCHEMA.empty_table(), *parallel_map(read_part, files)]
        ).combine_chunks()
        check_rows(table)
        if len(table) != about["utterances"]:
            raise ValueError(f"{len(table)} rows, expected {about['utterances']}")
        with (folder / "rejects.jsonl").open("rb") as lines:
            rejects = [Reject(**json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise_if_unreachable(folder, error)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ManifestError(f"{folder}: the index is damaged: {reason}") from None
    return with_absolute_paths(table, folder, prompt), rejects


def with_absolute_paths(table: pa.Table, folder: StoragePath, prompt: str) -> pa.Table:
    """Make the paths of an index folder's rows absolute, and set the prompt of rows without one."""
    uris, prompts = table["uri"], table["prompt"]
    inside = pc.binary_join_element_wise(_large(str(folder)), uris, _large("/"))
    for name, values in (
        ("uri", pc.if_else(pc.match_substring_regex(uris, "^/|://"), uris, inside)),
        ("prompt", pc.if_else(pc.equal(prompts, ""), prompt, prompts)),
    ):
        column = SCHEMA.get_field_index(name)
        table = table.set_column(column, SCHEMA.field(name), values)
    return table


def _large(text: str) -> pa.Scalar:
    """Make a scalar of the type of the table's texts: joining does not convert it."""
    return pa.scalar(text, pa.large_string())


def check_rows(table: pa.Table) -> None:
    """Raise ValueError, or an error of Arrow, for a table that is not one of index rows."""
    table.validate(full=True)
    needed = ("id", "uri", "start", "samples", "key", "text", "prompt")
    complete = not any(table[name].null_count for name in needed)
    if not complete or not pc.all(pc.greater(table["samples"], 0)).as_py() and len(table):
        raise ValueError("a row lacks id, uri, start, samples, key, text or prompt")


def read_part(file: StoragePath) -> pa.Table:
    """Read a part of an index folder in SCHEMA; its paths may be relative."""
    with open_ranges(file) as source:
        table = pq.read_table(source)
    if "labels" not in table.column_names:  # Nothing was kept, or by an older version.
        table = table.append_column("labels", pa.nulls(len(table), pa.large_string()))
    return table.select(SCHEMA.names).cast(SCHEMA)
