"""Write a part of an index: the measured rows of one part of a source, atomically.

DIR/index.json            sources, counts, and the order of the parts
DIR/parts/NAME.parquet    rows of omni.corpus.index.SCHEMA; metadata: the source's fingerprint
DIR/audio/NAME.bin        recordings that came inside rows, one after another
DIR/rejects.jsonl         rows that were left out, with reasons
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError
from omni.corpus.index import INDEX_VERSION, SCHEMA
from omni.corpus.lengths import Measuring
from omni.corpus.rejects import Reject
from omni.corpus.segments import cut_rows
from omni.corpus.sources import Options, Part, Row, Source
from omni.corpus.sources.base import fingerprint_of
from omni.storage.atomic import open_atomic
from omni.storage.path import StoragePath, open_ranges, raise_if_unreachable

_BATCH = 256  # rows measured in one go
_METADATA = b"omni"


def part_name(source: Source, part: Part) -> str:
    """Name the files of a part, alike in every run."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", part.name)[-60:].lstrip(".-")
    return f"{plain}-{fingerprint_of(source.spec, part.name)}"


def fingerprint(part: Part, options: Options) -> str:
    """Hash the content and the options that a part is made from."""
    return fingerprint_of(INDEX_VERSION, part.fingerprint, part.where, options.fingerprint)


def about_part(folder: StoragePath, name: str) -> dict[str, Any] | None:
    """Read `fingerprint`, `rejects` and `audio` (bytes) of a finished part; None without one."""
    try:
        with open_ranges(folder / "parts" / f"{name}.parquet") as file:
            metadata = pq.read_metadata(file).metadata
        about: dict[str, Any] = json.loads(metadata[_METADATA])
        audio = folder / "audio" / f"{name}.bin"
        if about["audio"] and audio.stat().st_size != about["audio"]:
            return None
        return about
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise_if_unreachable(folder, error)
        return None


def write_part(source: Source, part: Part, options: Options, folder: StoragePath) -> dict[str, Any]:
    """Measure a part and write its files; return rows, samples, rejects and bytes of audio.

    Raises ManifestError where the source is not what it should be.
    """
    name = part_name(source, part)
    # Without labels the files stay what they were before there was such a column.
    schema = SCHEMA if options.keep else SCHEMA.remove(SCHEMA.get_field_index("labels"))
    made: dict[str, Any] = {"rows": 0, "samples": 0, "rejects": [], "bytes": 0}
    audio, table = folder / "audio" / f"{name}.bin", folder / "parts" / f"{name}.parquet"
    for path in (table, audio):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The context managers close from the right: the table appears after its recordings.
    with (
        open_atomic(table) as sink,
        open_atomic(audio) as sound,
        pq.ParquetWriter(sink, schema) as writer,
    ):
        rows = source.read(part)
        if options.number_ids:
            rows = (replace(row, id=f"{name}:{n}") for n, row in enumerate(rows, start=1))
        if options.segment:
            rows = cut_rows(rows, options.segment, options.rewrite_texts)
        untranscribed, kept = options.segment is not None, _Kept(sound, f"audio/{name}.bin")
        measuring = Measuring(options.duration_tolerance)
        while taken := _next_batch(rows, kept, untranscribed, measuring):
            good, bad = _measured(taken, folder, untranscribed, measuring)
            writer.write_table(pa.Table.from_pylist(good, schema))
            made["rows"] += len(good)
            made["samples"] += sum(row["samples"] for row in good)
            made["rejects"] += bad
        made["bytes"] = sound.tell()
        rejects = [reject.to_dict() for reject in made["rejects"]]
        about = {"fingerprint": fingerprint(part, options), "audio": made["bytes"]}
        text = json.dumps({**about, "rejects": rejects})
        writer.add_key_value_metadata({_METADATA.decode(): text})
    if not made["bytes"]:
        audio.unlink()
    return made


class _Kept:
    """Append recordings to a file; consecutive spans of one recording share one copy."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file, self._uri = file, uri
        self._last, self._offset = b"", 0

    def place(self, data: bytes) -> dict[str, Any]:
        """Append a recording; return its file, offset and length in bytes."""
        if data is not self._last:
            self._last, self._offset = data, self._file.tell()
            self._file.write(data)
        return {"uri": self._uri, "offset": self._offset, "length": len(data)}


def _next_batch(
    rows: Iterator[Row], kept: _Kept, untranscribed: bool, measuring: Measuring
) -> list[tuple[Row, dict[str, Any] | AudioError | None]]:
    """Take rows; measure and keep the recordings that came inside them."""
    taken: list[tuple[Row, dict[str, Any] | AudioError | None]] = []
    for row in islice(rows, _BATCH):
        if row.data is None or row.error is not None:
            taken.append((row, None))
            continue
        found: dict[str, Any] | AudioError
        try:
            found = measuring.data(row.data, vars(row))
            if row.text or untranscribed:
                found |= kept.place(row.data)
        except AudioError as error:
            found = error
        plain = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "data"}
        taken.append((Row(**plain), found))
    return taken


def _measured(
    taken: list[tuple[Row, dict[str, Any] | AudioError | None]],
    folder: StoragePath,
    untranscribed: bool,
    measuring: Measuring,
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Return rows of the index, in order, and the rejects."""
    unmeasured = [row for row, found in taken if found is None and row.error is None]
    measured = iter(measuring.rows([vars(row) for row in unmeasured]))
    good: list[dict[str, Any]] = []
    bad: list[Reject] = []
    for row, found in taken:
        if row.error is not None:
            bad.append(Reject(row.id, row.uri, *row.error))
            continue
        found = next(measured) if found is None else found
        if isinstance(found, AudioError):
            bad.append(Reject(row.id, row.uri, found.reason, found.detail))
        elif not (row.text or untranscribed):
            bad.append(Reject(row.id, row.uri, "empty text", "nothing to learn from"))
        else:
            columns = {k: v for k, v in asdict(row).items() if k in SCHEMA.names}
            columns |= found
            columns["uri"] = _relative(columns["uri"], folder)
            columns["prompt"] = columns["prompt"] or ""
            good.append(columns)
    return good, bad


def _relative(uri: str, folder: StoragePath) -> str:
    """Make a path inside the index folder relative, so that the folder can be moved."""
    return uri.removeprefix(f"{folder}/")
