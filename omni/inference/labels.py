"""Write the transcripts of a corpus as a corpus: an index folder (Parquet), or JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.index import INDEX_VERSION, SCHEMA
from omni.corpus.index_row import IndexRow
from omni.corpus.manifest import INDEX_FILE
from omni.corpus.rejects import Reject
from omni.errors import ConfigError
from omni.inference.confidence import confidence_of
from omni.inference.rows import manifest_fields
from omni.inference.transcriber import Transcript
from omni.storage.atomic import open_atomic, write_atomic
from omni.storage.path import StoragePath, remove_tree

CorpusFormat = Literal["jsonl", "parquet"]
LINES_FILE = "transcripts.jsonl"
_PART_ROWS = 10_000
_FIELDS = [
    ("confidence", pa.float64()),
    ("token_probability", pa.float64()),
    ("ctc_agreement", pa.float64()),
    ("cut", pa.bool_()),
    ("decoder", pa.string()),
]
_LABELLED = pa.schema([*SCHEMA, *_FIELDS])


@dataclass
class Written:
    """Count the rows of a corpus of transcripts. left_out: rows that it lacks, by reason."""

    utterances: int = 0
    seconds: float = 0.0
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    """Rows left out whose recording could not be read."""


def check_format(table: pa.Table, wanted: CorpusFormat) -> None:
    """Raise ConfigError where JSON lines cannot name the recordings of a corpus."""
    if wanted == "jsonl" and table["length"].null_count < len(table):
        raise ConfigError(
            "--format jsonl: recordings of this corpus lie inside archives, which only Parquet can "
            "name: expected --format parquet"
        )


def write_labels(
    pairs: Iterable[tuple[IndexRow, Transcript | ValueError]],
    out: StoragePath,
    wanted: CorpusFormat,
    min_confidence: float,
    sources: list[str],
    decoding: str,
) -> Written:
    """Write transcripts into a folder, in order.

    Rows of which the recording cannot be read, conversations, and with `min_confidence` those below
    it and those that are cut, are left out, counted, and listed in rejects.jsonl. sources: of the
    corpus, and decoding: of its texts, for index.json.
    """
    made = Written()
    rejects: list[Reject] = []
    rows = _labelled(pairs, min_confidence, made, rejects)
    out.mkdir(parents=True, exist_ok=True)
    if wanted == "jsonl":
        with open_atomic(out / LINES_FILE) as file:
            for row, columns in rows:
                line = {**manifest_fields(row), "text": row["text"], **columns}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        parts: list[str] = []
    else:
        # Training must not read a mix of old and new parts.
        (out / INDEX_FILE).unlink(missing_ok=True)
        if (out / "parts").is_dir():
            remove_tree(out / "parts")
        parts = list(_write_parts(rows, out))
    lines = [json.dumps(reject.to_dict(), ensure_ascii=False) + "\n" for reject in rejects]
    write_atomic(out / "rejects.jsonl", "".join(lines).encode(errors="replace"))
    if wanted == "parquet":
        about: dict[str, Any] = {
            "version": INDEX_VERSION,
            "sources": sources,
            "decoding": decoding,
            "utterances": made.utterances,
            "seconds": made.seconds,
            "rejects": dict(made.left_out),
            "parts": parts,
        }
        write_atomic(out / INDEX_FILE, json.dumps(about, indent=1, ensure_ascii=False).encode())
    return made


def _labelled(
    pairs: Iterable[tuple[IndexRow, Transcript | ValueError]],
    min_confidence: float,
    made: Written,
    rejects: list[Reject],
) -> Iterator[tuple[IndexRow, dict[str, Any]]]:
    """Yield the rows that are kept, with their new text, and the columns beside it."""
    for row, found in pairs:
        reason, detail, columns = _judged(row, found, min_confidence)
        if reason:
            made.left_out[reason] += 1
            made.unread += isinstance(found, ValueError)
            rejects.append(Reject(row["id"], row["uri"], reason, detail))
            continue
        assert isinstance(found, Transcript)
        made.utterances += 1
        made.seconds += row["samples"] / SAMPLING_RATE
        made.cut += found.cut
        row["text"] = found.text
        yield row, columns


def _judged(
    row: IndexRow, found: Transcript | ValueError, min_confidence: float
) -> tuple[str, str, dict[str, Any]]:
    """Return the reason to leave a row out, with detail, or else its columns."""
    if isinstance(found, AudioError):
        return found.reason, found.detail, {}
    if isinstance(found, ValueError):
        return "refused", str(found), {}
    if row["messages"] is not None:
        return "conversation", "its answer is a part of its messages", {}
    sure = confidence_of(found, row["language"] or "en")
    if min_confidence:
        if found.cut:
            return "cut", "the limit of tokens came before the end", {}
        if sure.value is None or sure.value < min_confidence:
            return "low confidence", f"{sure.value}, expected {min_confidence:g} or more", {}
    cut = {"cut": True} if found.cut else {}
    return "", "", {**sure.fields, **cut, "decoder": found.decoder}


def _write_parts(
    rows: Iterator[tuple[IndexRow, dict[str, Any]]], out: StoragePath
) -> Iterator[str]:
    """Write the parts of an index; yield their names."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    number = 0
    while taken := list(islice(rows, _PART_ROWS)):
        name = f"transcripts-{number:06}"
        inside = f"{out}/"
        values = [
            {**row, **columns, "uri": row["uri"].removeprefix(inside)} for row, columns in taken
        ]
        with open_atomic(out / "parts" / f"{name}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(values, _LABELLED), file)
        yield name
        number += 1
