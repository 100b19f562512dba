"""Read tables of utterances: Parquet with audio inside or by path, and tables of `datasets`."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.corpus.labels import labels_json
from omni.corpus.manifest import check_row, stated_duration
from omni.corpus.other_files import NOT_A_RECORDING, is_system_file
from omni.corpus.rejects import Reject
from omni.corpus.sources.base import (
    COLUMNS,
    Options,
    Part,
    Row,
    explain_missing,
    file_fingerprint,
    fingerprint_of,
    manifest_fields,
)
from omni.corpus.sources.row_audio import Recording, find_recording
from omni.errors import ManifestError
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, open_ranges, raise_if_unreachable

Labels = Mapping[str, list[str]]
BATCH = 32  # rows with audio in memory at a time


class ParquetSource:
    """Parquet files; a part is some row groups of one of them."""

    def __init__(self, spec: str, paths: list[StoragePath], options: Options) -> None:
        self.spec, self.options = spec, options
        self.paths = dict(enumerate(paths))

    def narrowed(self, part: Part) -> ParquetSource:
        """See `source_of_part`."""
        narrow = copy.copy(self)
        narrow.paths = {part.where[0]: self.paths[part.where[0]]}
        return narrow

    def parts(self) -> list[Part]:
        parts = []
        paths = list(self.paths.values())
        common = os.path.commonpath([str(path.parent) for path in paths])
        for number, (path, (mark, sizes)) in enumerate(
            zip(paths, parallel_map(_groups, paths), strict=True)
        ):
            first = 0
            for groups in _gather(sizes, self.options.rows_per_part):
                name = f"{os.path.relpath(str(path), common)}-{groups[0]:06}"
                parts.append(Part(name, fingerprint_of(*mark, groups), (number, groups, first)))
                first += sum(sizes[g] for g in groups)
        return parts

    def read(self, part: Part) -> Iterator[Row]:
        number, groups, first = part.where
        path = self.paths[number]
        if is_system_file(path.name):
            yield Row.of_reject(Reject(path.name, str(path), NOT_A_RECORDING, "not a table"))
            return
        try:
            with _opened(path) as file:
                names = file.schema_arrow.names
                labels = label_names(file.schema_arrow.metadata)
                columns = [name for name in names if name in wanted_columns(self.options)]
                batches = file.iter_batches(BATCH, row_groups=list(groups), columns=columns)
                for batch in batches:
                    table = pa.Table.from_batches([batch])
                    yield from rows_of(
                        table, str(path), f"{path.parent.name}/{path.stem}", first, path.parent,
                        self.options, names, labels,
                    )  # fmt: skip
                    first += len(table)
        except (OSError, pa.ArrowException) as error:
            raise_if_unreachable(path, error)
            raise ManifestError(f"{path}: damaged Parquet: {error}") from None


@contextlib.contextmanager
def _opened(path: StoragePath) -> Iterator[pq.ParquetFile]:
    with open_ranges(path) as file:
        yield pq.ParquetFile(file)


def _groups(path: StoragePath) -> tuple[list[Any], list[int]]:
    """Return fingerprints and row-group sizes of a Parquet file. Raises ManifestError."""
    mark: list[Any] = [file_fingerprint(path)]
    if is_system_file(path.name):
        return mark, [1]
    try:
        with _opened(path) as file:
            # Parts made before labels had names hold their numbers: make them again.
            mark += [labels] if (labels := label_names(file.schema_arrow.metadata)) else []
            metadata = file.metadata
            return mark, [metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise_if_unreachable(path, error)
        raise ManifestError(f"{path}: expected Parquet: {error}") from None


def _gather(sizes: list[int], rows: int) -> Iterator[tuple[int, ...]]:
    """Group neighbouring row groups into parts of about `rows` rows."""
    groups: list[int] = []
    held = 0
    for group, size in enumerate(sizes):
        groups.append(group)
        held += size
        if held >= rows:
            yield tuple(groups)
            groups, held = [], 0
    if groups:
        yield tuple(groups)


def label_names(metadata: Mapping[bytes, bytes] | None) -> Labels:
    """Return the names of ClassLabel columns, from what `datasets` writes into a table's schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _labelled(position: str, fields: dict[str, Any], labels: Labels) -> dict[str, Any]:
    """Replace numbers of labels by their names; -1, which means unlabelled, by None."""
    named = dict(fields)
    for column in labels.keys() & fields.keys():
        value = fields[column]
        if isinstance(value, int) and value >= len(labels[column]):
            count = len(labels[column])
            raise ManifestError(f"{position}: field {column!r}: label {value} of {count}")
        if isinstance(value, int):
            named[column] = labels[column][value] if value >= 0 else None
    return named


def wanted_columns(options: Options) -> set[str]:
    usual = {name for names in COLUMNS.values() for name in names}
    return usual | set(options.columns.values()) | set(options.keep)


def rows_of(
    table: pa.Table,
    position: str,
    name: str,
    first: int,
    folder: StoragePath | None,
    options: Options,
    columns: list[str],
    labels: Labels,
) -> Iterator[Row]:
    """Yield the utterances of a table. position, name: prefix of messages, prefix of ids.

    first: the number of its first row, from 0. folder: what paths are relative to, or a hub's
    dataset. columns: all that the corpus has, for messages. labels: names of labels, by column.

    Raises ManifestError.
    """
    for number, fields in enumerate(table.to_pylist(), start=first + 1):
        row = manifest_fields(_labelled(f"{position}:{number}", fields, labels), options)
        for field in ("audio", "text"):
            if field not in row:
                missing = explain_missing(field, columns, options)
                raise ManifestError(f"{position}:{number}: {missing}")
        row["text"] = "" if row["text"] is None else row["text"]
        row["labels"] = labels_json(f"{position}:{number}", row["labels"])
        audio = row.pop("audio")
        held = _held(f"{position}:{number}", audio)
        if held is not None:
            # The row holds the cut audio; with an offset, these are times in what it was cut from.
            times = {"offset", "duration"} if row.get("offset") is not None else {"offset"}
            for time in times - options.columns.keys():
                row.pop(time, None)
        check_row(f"{position}:{number}", {**row, "audio": ""})
        row["text"] = row["text"].strip()
        start, duration = row.pop("offset", None), row.pop("duration", None)
        row["start"] = float(start or 0.0)
        row["duration"] = float(duration) if None not in (start, duration) else None
        row["stated_duration"] = stated_duration(start, duration)
        row["id"] = f"{name}:{number}" if row.get("id") is None else row["id"]
        if held is not None:
            yield Row(**row, data=held)
            continue
        path = audio["path"] if isinstance(audio, dict) else audio
        found = Recording(error=("missing", f"{position}:{number}: neither bytes nor a path"))
        if path:
            found = find_recording(f"{position}:{number}", path, folder, options)
        yield Row(**row, **vars(found))


def _held(position: str, audio: Any) -> bytes | None:
    """Return the encoded audio inside a row, if any."""
    if isinstance(audio, dict) and not {"bytes", "path"} & audio.keys():
        raise ManifestError(
            f"{position}: field 'audio': expected an encoded audio file (bytes or path), "
            f"got {', '.join(audio)}"
        )
    if isinstance(audio, (dict, bytes, str)) or audio is None:
        data = audio.get("bytes") if isinstance(audio, dict) else audio
        return data if isinstance(data, bytes) else None
    raise ManifestError(
        f"{position}: field 'audio': expected an encoded audio file, its path, or both, "
        f"got {type(audio).__name__}"
    )
