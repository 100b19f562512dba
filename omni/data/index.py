"""The index: one row per utterance with what the plan must know before any audio is decoded.

Sample counts come from the audio files' headers, in parallel, and are kept between runs; a
manifest's `duration` is never trusted, because the plan reserves slots by it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from omni.data.conversations import answer_of, parse_messages, to_column
from omni.data.measure import Reject, measure_all
from omni.data.tar import TarError, read_tar
from omni.model.conversation import Message
from omni.model.hub import ASSETS

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
        ("messages", pa.string()),  # JSON, see omni.data.conversations
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
        return sum(self.table["samples"].to_pylist()) / 16_000 / 3600

    @property
    def fingerprint(self) -> str:
        """Changes with the content, length, text or order of any utterance; not with paths."""
        digest = hashlib.blake2b(digest_size=12)
        for name in ("key", "samples", "text", "prompt", "task", "messages"):
            values = self.table[name].to_pylist()
            if name not in ("task", "messages") or any(value is not None for value in values):
                digest.update(repr(values).encode())
        return digest.hexdigest()


def manifest_path(spec: str) -> Path:
    """A manifest's path; `embedded:train|dev|test` is the corpus that comes with omni."""
    if spec.startswith("embedded:"):
        path = ASSETS / "prompts-en" / f"{spec.removeprefix('embedded:')}.jsonl"
        if not path.is_file():
            raise ManifestError(f"{spec}: expected embedded:train, embedded:dev or embedded:test")
        return path
    path = Path(spec).expanduser().absolute()
    if not path.is_file():
        raise ManifestError(f"{spec}: no such manifest")
    return path


def build_index(
    specs: Sequence[str],
    *,
    prompt: str = "",
    cache_dir: Path | None = None,
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
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    for spec in specs:
        path = manifest_path(spec)
        parsed = list(_read_manifest(path, prompt, allow_absolute))
        if not parsed:
            raise ManifestError(f"{spec}: the manifest has no rows")
        good, bad = measure_all(parsed, path, cache_dir, threads)
        rows += good
        rejects += bad
    if not rows:
        first = rejects[0]
        raise ManifestError(
            f"{', '.join(specs)}: all {len(rejects)} rows were rejected; "
            f"the first, {first.id}: {first.reason}: {first.detail}"
        )
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ManifestError(f"{', '.join(specs)}: the id {row['id']!r} occurs twice")
        seen.add(row["id"])
    return Index(pa.Table.from_pylist(rows, SCHEMA), rejects)


def _read_manifest(path: Path, prompt: str, allow_absolute: bool) -> Iterator[dict[str, Any]]:
    """Rows with absolute `uri`, checked types and defaults, without audio measurements."""
    tar = path.suffix == ".tar"
    for place, row in _tar_rows(path) if tar else _json_rows(path):
        conversation = _conversation(place, row) if "messages" in row and not tar else None
        messages, spoken = conversation or (None, [row])
        if messages is not None:
            row = {**row, "audio": spoken[0]["audio"], "text": answer_of(messages)}
        _check_row(place, row)
        for part in spoken:
            _check_row(place, {**part, "text": part.get("text") or ""})
            if not tar and not allow_absolute and _leaves(part["audio"]):
                raise ManifestError(
                    f"{place}: field 'audio': {part['audio']!r} lies outside the manifest's "
                    "folder; data.allow_absolute (--allow_absolute) admits such files"
                )
        places = [_place(path, part, tar) for part in spoken]
        identity = row.get("id")
        yield {
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


def _place(path: Path, row: dict[str, Any], tar: bool) -> dict[str, Any]:
    """Where a recording lies."""
    offset, length = row["bytes"] if tar else (None, None)
    spans = row.get("offset") is not None and row.get("duration") is not None
    return {
        "uri": str(path if tar else path.parent / row["audio"]),
        "offset": offset,
        "length": length,
        "start": float(row.get("offset") or 0.0),
        # Without an offset the utterance is the whole file, however long it really is.
        "duration": float(row["duration"]) if spans else None,
    }


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _tar_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for row in read_tar(path):
            yield f"{path}:{row['audio']}", row
    except TarError as error:
        raise ManifestError(str(error)) from None


def _leaves(name: str) -> bool:
    """Whether a path leads out of the folder that it is relative to, by its words alone: a link in
    that folder is its owner's doing."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def _check_row(place: str, row: dict[str, Any]) -> None:
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


def recordings(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The recordings of an index row: itself, or those of its conversation."""
    return row["audios"] or [row]
