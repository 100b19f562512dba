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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.data.audio import AudioError, AudioSpan, measure
from omni.data.tar import TarError, read_tar
from omni.model.hub import ASSETS

_EDGE = 64 * 1024  # bytes hashed at each end of a file
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
}

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),  # of the recording in an archive, in bytes; null: the whole file
        ("length", pa.int64()),
        ("start", pa.float64()),  # seconds into the file
        ("duration", pa.float64()),  # seconds; null: to the end of the file
        ("samples", pa.int64()),  # at 16 kHz, from the header
        ("key", pa.string()),  # content hash: names the utterance in the feature cache
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("language", pa.string()),
        ("speaker", pa.string()),
    ]
)


class ManifestError(ValueError):
    """A manifest cannot be used; the message names file, line, field and what was expected."""


@dataclass(frozen=True)
class Reject:
    """An utterance that is left out, with a reason of a few words."""

    id: str
    uri: str
    reason: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Index:
    table: pa.Table  # of SCHEMA
    rejects: list[Reject] = field(default_factory=list)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def hours(self) -> float:
        return sum(self.table["samples"].to_pylist()) / 16_000 / 3600

    @property
    def fingerprint(self) -> str:
        """Changes with the content, length, text or order of any utterance; not with paths."""
        digest = hashlib.blake2b(digest_size=12)
        for name in ("key", "samples", "text", "prompt"):
            digest.update(repr(self.table[name].to_pylist()).encode())
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
        good, bad = _measure_all(parsed, path, cache_dir, threads)
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
        _check_row(place, row)
        if not tar and not allow_absolute and _leaves(row["audio"]):
            raise ManifestError(
                f"{place}: field 'audio': {row['audio']!r} lies outside the manifest's folder; "
                "data.allow_absolute (--allow_absolute) admits such files"
            )
        spans, identity = row.get("offset") is not None, row.get("id")
        offset, length = row["bytes"] if tar else (None, None)
        yield {
            "id": place.replace(str(path), f"{path.parent.name}/{path.stem}")
            if identity is None
            else str(identity),
            "uri": str(path if tar else path.parent / row["audio"]),
            "offset": offset,
            "length": length,
            "start": float(row.get("offset") or 0.0),
            # Without an offset the utterance is the whole file, however long it really is.
            "duration": float(row["duration"])
            if spans and row.get("duration") is not None
            else None,
            "text": row["text"].strip(),
            "prompt": row.get("prompt") or prompt,
            "language": row.get("language"),
            "speaker": row.get("speaker"),
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


def _measure_all(
    rows: list[dict[str, Any]], manifest: Path, cache_dir: Path | None, threads: int
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Add `samples` and `key` to rows; unchanged files are not opened again."""
    known = _Measurements(manifest, cache_dir)
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda row: _measure_one(row, known), rows))
    good: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, AudioError):
            rejects.append(Reject(row["id"], row["uri"], result.reason, result.detail))
        elif not row["text"]:
            rejects.append(Reject(row["id"], row["uri"], "empty text", "nothing to learn from"))
        else:
            good.append({**row, **result})
    known.save()
    return good, rejects


def _measure_one(row: dict[str, Any], known: _Measurements) -> dict[str, Any] | AudioError:
    try:
        status = os.stat(row["uri"])
    except OSError:
        return AudioError("missing", f"no such file: {row['uri']}")
    span = span_of(row)
    name = [row["uri"], row["start"], row["duration"], status.st_size, status.st_mtime_ns]
    name += [span.bytes] if span.bytes else []
    if (found := known.get(repr(name))) is not None:
        return found
    try:
        samples = measure(row["uri"], span)
    except AudioError as error:
        return error
    result = {"samples": samples, "key": _content_key(row, status.st_size)}
    known.put(repr(name), result)
    return result


def _content_key(row: dict[str, Any], size: int) -> str:
    """Hash of the recording's size and both ends (all of a small one) and of the span in it."""
    first, size = (0, size) if row["length"] is None else (row["offset"], row["length"])
    digest = hashlib.blake2b(f"{size} {row['start']} {row['duration']}".encode(), digest_size=16)
    with open(row["uri"], "rb") as file:
        file.seek(first)
        digest.update(file.read(min(_EDGE, size)))
        if size > _EDGE:
            file.seek(first + max(_EDGE, size - _EDGE))
            digest.update(file.read(min(_EDGE, size - _EDGE)))
    return digest.hexdigest()


def span_of(row: dict[str, Any]) -> AudioSpan:
    """Where the utterance of an index row lies in its file."""
    inside = None if row["length"] is None else (row["offset"], row["length"])
    return AudioSpan(row["start"], row["duration"], inside)


class _Measurements:
    """What earlier runs measured of one manifest's files, kept as Parquet."""

    def __init__(self, manifest: Path, cache_dir: Path | None) -> None:
        self._values: dict[str, dict[str, Any]] = {}
        self._fresh = False
        self._path: Path | None = None
        if cache_dir is None:
            return
        name = hashlib.blake2b(str(manifest).encode(), digest_size=8).hexdigest()
        self._path = cache_dir / f"index-{name}.parquet"
        try:
            for row in pq.read_table(self._path).to_pylist():
                self._values[row.pop("file")] = row
        except (OSError, pa.ArrowException, KeyError):
            self._values = {}  # absent or damaged: measure again

    def get(self, name: str) -> dict[str, Any] | None:
        return self._values.get(name)

    def put(self, name: str, value: dict[str, Any]) -> None:
        self._values[name] = value
        self._fresh = True

    def save(self) -> None:
        if self._path is None or not self._fresh:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"file": name, **value} for name, value in self._values.items()]
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        pq.write_table(pa.Table.from_pylist(rows), temporary)
        os.replace(temporary, self._path)
