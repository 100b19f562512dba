"""The index: one row per utterance with what the plan must know before any audio is decoded.

Sample counts come from the audio files' headers, in parallel, and are kept between runs; a
manifest's `duration` is never trusted, because the plan reserves slots by it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from omni.audio.logmel import SAMPLES_PER_HOUR
from omni.corpus.audio_paths import recording_uri
from omni.corpus.lengths import Reject, measure_all
from omni.corpus.messages import answer_of, parse_messages, to_column
from omni.corpus.tar import TarError, read_tar
from omni.model.chat_template import Message
from omni.model.download import ASSETS
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StorageError, StoragePath, public_uri, raise_if_unreachable
from omni.storage.path import as_path as at

INDEX_FILE = "index.json"  # of a folder that jobs.index made
INDEX_VERSION = 1
_BATCH = 65_536  # rows that are Python objects at a time
_LONGEST_SECONDS = 1e8  # three years
_TYPES: dict[str, tuple[type, ...]] = {
    "audio": (str,),
    "text": (str,),
    "id": (str, int),
    "duration": (int, float),
    "offset": (int, float),
    "language": (str,),
    "speaker": (str,),
    "prompt": (str,),
    "task": (str,),
}
_PLACE = [
    ("uri", pa.string()),
    ("offset", pa.int64()),  # of the recording in an archive, in bytes; null: the whole file
    ("length", pa.int64()),
    ("start", pa.float64()),  # seconds into the file
    ("duration", pa.float64()),  # seconds; null: to the end of the file
    ("samples", pa.int64()),  # at 16 kHz, from the header
    ("key", pa.string()),  # content hash: names the recording in the feature cache
]

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *_PLACE,
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("language", pa.string()),
        ("speaker", pa.string()),
        ("task", pa.string()),
        # Of a conversation only; then samples is their sum, key one for all, text the last answer.
        ("messages", pa.string()),  # JSON, see omni.corpus.messages
        ("audios", pa.list_(pa.struct([*_PLACE, ("text", pa.string())]))),
    ]
)


class ManifestError(ValueError):
    """A manifest cannot be used; the message names file, line, field and what was expected."""


@dataclass(frozen=True)
class Index:
    table: pa.Table  # of SCHEMA
    rejects: list[Reject] = field(default_factory=list)
    weights: np.ndarray | None = None  # (n,) occurrences in an epoch; None: one each

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def hours(self) -> float:
        return int(pc.sum(self.table["samples"]).as_py() or 0) / SAMPLES_PER_HOUR

    @property
    def fingerprint(self) -> str:
        """Changes with the content, length, text or order of any utterance; not with paths."""
        digest = hashlib.blake2b(digest_size=12)
        for name in ("key", "samples", "text", "prompt", "task", "messages"):
            column = self.table[name]
            if name in ("task", "messages") and column.null_count == len(column):
                continue
            digest.update(b"[")  # the repr of a list, which need not be in memory
            for number, batch in enumerate(self.table.select([name]).to_batches(_BATCH)):
                items = repr(batch[0].to_pylist())[1:-1]
                digest.update(f"{', ' if number else ''}{items}".encode())
            digest.update(b"]")
        return digest.hexdigest()


def manifest_path(spec: str) -> StoragePath:
    """A manifest's place; `embedded:train|dev|test` is the corpus that comes with omni.

    Raises ManifestError, and OSError for object storage that does not answer.
    """
    if spec.startswith("embedded:"):
        path: StoragePath = ASSETS / "prompts-en" / f"{spec.removeprefix('embedded:')}.jsonl"
        if not path.is_file():
            raise ManifestError(f"{spec}: expected embedded:train, embedded:dev or embedded:test")
        return path
    path = absolute(spec)
    try:
        there, folder = path.exists(), path.is_dir()
    except StorageError as error:
        raise ManifestError(str(error)) from None
    if folder:
        if not (path / INDEX_FILE).is_file():
            raise ManifestError(
                f"{public_uri(spec)}: expected a manifest, or a folder that jobs.index has "
                f"finished: no {INDEX_FILE} in it"
            )
        return path / INDEX_FILE
    if not there:
        raise ManifestError(f"{public_uri(spec)}: no such manifest")
    return path


def absolute(spec: str) -> StoragePath:
    """A path from the root, or a URI as it is."""
    path = at(spec)
    return path.expanduser().absolute() if isinstance(path, Path) else path


def build_index(
    specs: Sequence[str],
    *,
    prompt: str = "",
    cache_dir: StoragePath | None = None,
    threads: int = 8,
    allow_absolute: bool = False,
) -> Index:
    """Index the manifests (JSON lines, or tar shards), in order. Rows with bad audio or no text
    become rejects.

    A manifest may only name files in its own folder, unless `allow_absolute`: who writes a manifest
    is not always who may read this machine's files.
    Raises ManifestError where a manifest is missing or a row is not what a manifest row must be,
    where no row is left, or where ids repeat.
    """
    tables: list[pa.Table] = []
    rejects: list[Reject] = []
    names = ", ".join(map(public_uri, specs))
    for spec in specs:
        path = manifest_path(spec)
        if path.name == INDEX_FILE and absolute(spec).name != INDEX_FILE:
            table, bad = read_built(path.parent, prompt)
            spoken = pc.not_equal(table["text"], "")
            rejects += _without_text(table.filter(pc.invert(spoken))) + bad
            tables.append(table.filter(spoken))
            continue
        parsed = list(_read_manifest(path, prompt, allow_absolute))
        if not parsed:
            raise ManifestError(f"{public_uri(spec)}: the manifest has no rows")
        good, bad = measure_all(parsed, path, cache_dir, threads)
        tables.append(pa.Table.from_pylist(good, SCHEMA))
        rejects += bad
    table = pa.concat_tables(tables)
    if not len(table):
        first = rejects[0]
        raise ManifestError(
            f"{names}: all {len(rejects)} rows were rejected; "
            f"the first, {first.id}: {first.reason}: {first.detail}"
        )
    if (repeated := repeated_id(table["id"])) is not None:
        raise ManifestError(f"{names}: the id {repeated!r} occurs twice")
    return Index(table, rejects)


def repeated_id(ids: pa.ChunkedArray) -> str | None:
    """The first of the ids that occurs more than once."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return None
    counts = pc.value_counts(ids)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return str(twice[0])


def _without_text(table: pa.Table) -> list[Reject]:
    why = "nothing to learn from before jobs.transcribe wrote it down"
    rows = zip(table["id"].to_pylist(), table["uri"].to_pylist(), strict=True)
    return [Reject(name, uri, "no text", why) for name, uri in rows]


def read_built(folder: StoragePath, prompt: str = "") -> tuple[pa.Table, list[Reject]]:
    """What jobs.index wrote: rows that are measured, paths made absolute, and the rejects.

    table: of SCHEMA; rows that nobody has written down have an empty text.
    Raises ManifestError.
    """
    try:
        about = json.loads((folder / INDEX_FILE).read_bytes())
        if about["version"] != INDEX_VERSION:
            raise ValueError(f"version {about['version']!r}, expected {INDEX_VERSION}")
        files = [folder / "parts" / f"{Path(name).name}.parquet" for name in about["parts"]]
        table = pa.concat_tables(
            [SCHEMA.empty_table(), *parallel_map(_part, files)]
        ).combine_chunks()
        table.validate(full=True)
        needed = ("id", "uri", "start", "samples", "key", "text", "prompt")
        whole = not any(table[name].null_count for name in needed)
        if not whole or not pc.all(pc.greater(table["samples"], 0)).as_py() and len(table):
            raise ValueError("a row lacks its id, place, length or text")
        if len(table) != about["utterances"]:
            raise ValueError(f"{len(table)} rows, expected {about['utterances']}")
        with (folder / "rejects.jsonl").open("rb") as lines:
            rejects = [Reject(**json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise_if_unreachable(folder, error)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ManifestError(f"{folder}: the index is damaged: {reason}") from None
    uris, prompts = table["uri"], table["prompt"]
    inside = pc.binary_join_element_wise(str(folder), uris, "/")
    for name, values in (
        ("uri", pc.if_else(pc.match_substring_regex(uris, "^/|://"), uris, inside)),
        ("prompt", pc.if_else(pc.equal(prompts, ""), prompt, prompts)),
    ):
        column = SCHEMA.get_field_index(name)
        table = table.set_column(column, SCHEMA.field(name), values)
    return table, rejects


def _part(file: StoragePath) -> pa.Table:
    with file.open("rb") if isinstance(file, Path) else file.ranges() as source:
        return pq.read_table(source).select(SCHEMA.names).cast(SCHEMA)


def _read_manifest(
    path: StoragePath, prompt: str, allow_absolute: bool
) -> Iterator[dict[str, Any]]:
    """Rows with absolute `uri`, checked types and defaults, without audio measurements."""
    tar = path.suffix == ".tar"
    for place, row in _tar_rows(path) if tar else _json_rows(path):
        yield checked_row(path, place, row, prompt=prompt, allow_absolute=allow_absolute)


def checked_row(
    path: StoragePath,
    place: str,
    row: dict[str, Any],
    *,
    prompt: str = "",
    allow_absolute: bool = False,
) -> dict[str, Any]:
    """A row of the index without measurements, from one of the manifest at `path`.

    row: with `bytes`, its recording is that range of the manifest itself. place: for messages.
    Raises ManifestError.
    """
    tar = isinstance(row.get("bytes"), tuple)  # which no JSON can hold
    conversation = _conversation(place, row) if "messages" in row and not tar else None
    messages, spoken = conversation or (None, [row])
    if messages is not None:
        row = {**row, "audio": spoken[0]["audio"], "text": answer_of(messages)}
    check_row(place, row)
    for part in spoken:
        check_row(place, {**part, "text": part.get("text") or ""})
    try:
        places = [_place(path, part, tar, allow_absolute) for part in spoken]
    except ValueError as error:
        raise ManifestError(f"{place}: field 'audio': {error}") from None
    identity = row.get("id")
    return {
        "id": place.replace(str(path), f"{path.parent.name}/{path.stem}")
        if identity is None
        else str(identity),
        **places[0],
        "text": row["text"].strip(),
        "prompt": row.get("prompt") or prompt,
        "language": row.get("language"),
        "speaker": row.get("speaker"),
        "task": row.get("task"),
        "messages": None if messages is None else to_column(messages),
        "audios": None
        if messages is None
        else [{**p, "text": s.get("text")} for p, s in zip(places, spoken, strict=True)],
    }


def _conversation(place: str, row: dict[str, Any]) -> tuple[list[Message], list[dict[str, Any]]]:
    if not _storable(json.dumps(row["messages"], ensure_ascii=False)):
        raise ManifestError(f"{place}: field 'messages': it holds what is no text")
    try:
        return parse_messages(row)
    except ValueError as error:
        raise ManifestError(f"{place}: field 'messages': {error}") from None


def _place(
    path: StoragePath, row: dict[str, Any], tar: bool, allow_absolute: bool
) -> dict[str, Any]:
    """Where a recording lies. Raises ValueError where it may not."""
    offset, length = row["bytes"] if tar else (None, None)
    spans = row.get("offset") is not None and row.get("duration") is not None
    return {
        "uri": str(path) if tar else recording_uri(path.parent, row["audio"], allow_absolute),
        "offset": offset,
        "length": length,
        "start": float(row.get("offset") or 0.0),
        # Without an offset the utterance is the whole file, however long it really is.
        "duration": float(row["duration"]) if spans else None,
    }


def _json_rows(path: StoragePath) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ManifestError(f"{place}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ManifestError(f"{place}: expected an object, got {line[:40]!r}")
            yield place, row


def _tar_rows(path: StoragePath) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for row in read_tar(path):
            yield f"{path}:{row['audio']}", row
    except TarError as error:
        raise ManifestError(str(error)) from None


def check_row(place: str, row: dict[str, Any]) -> None:
    """Raises ManifestError naming the field and what was expected."""
    for name in ("audio", "text"):
        if name not in row:
            raise ManifestError(f"{place}: field {name!r} is missing")
    for name, types in _TYPES.items():
        value = row.get(name)
        if not _storable(value):
            raise ManifestError(f"{place}: field {name!r}: {value!r} is no finite number or text")
        if value is None and name not in ("audio", "text"):
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join(t.__name__ for t in types)
            raise ManifestError(f"{place}: field {name!r}: expected {expected}, got {value!r}")
        if isinstance(value, (int, float)) and name != "id" and abs(value) > _LONGEST_SECONDS:
            raise ManifestError(f"{place}: field {name!r}: {value!r} seconds are no recording's")


def _storable(value: Any) -> bool:
    """Finite, and without half characters or NUL, which no path and no table can hold."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    return not isinstance(value, float) or math.isfinite(value)
