"""Read manifests: JSON lines or tar shards, each row checked before any audio is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from omni.corpus.audio_paths import AddressError, recording_uri
from omni.corpus.labels import kept_fields, labels_json
from omni.corpus.messages import answer_of, messages_json, parse_messages
from omni.corpus.other_files import utf8_name
from omni.corpus.rejects import Reject
from omni.corpus.tar import Fields, TarError, read_tar
from omni.corpus.text_file import json_lines
from omni.errors import ManifestError as ManifestError  # Much imports it from here.
from omni.model.chat_template import Message
from omni.model.download import ASSETS
from omni.storage.filesystem import StorageError
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import public_uri

INDEX_FILE = "index.json"  # marks a folder that `omni index` has finished
_LONGEST_SECONDS = 1e8
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


def manifest_path(spec: str) -> StoragePath:
    """Find the manifest that a setting names: a file, or the index.json of an index folder.

    `embedded:train`, `embedded:dev` and `embedded:test` are the corpus that comes with omni.
    Raises ManifestError, and OSError for object storage that does not answer.
    """
    if spec.startswith("embedded:"):
        path: StoragePath = ASSETS / "prompts-en" / f"{spec.removeprefix('embedded:')}.jsonl"
        if not path.is_file():
            raise ManifestError(f"{spec}: expected embedded:train, embedded:dev or embedded:test")
        return path
    path = absolute(spec)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except StorageError as error:
        raise ManifestError(str(error)) from None
    if is_folder:
        if not (path / INDEX_FILE).is_file():
            raise ManifestError(
                f"{public_uri(spec)}: expected a manifest, or a folder that `omni index` or "
                f"`omni annotate` has finished: there is no {INDEX_FILE} in it"
            )
        return path / INDEX_FILE
    if not exists:
        raise ManifestError(f"{public_uri(spec)}: no such manifest")
    return path


def absolute(spec: str) -> StoragePath:
    """Make a path absolute; leave a URI as it is. Raises ManifestError for one not in UTF-8."""
    path = as_path(spec).expanduser().absolute()
    if (shown := utf8_name(str(path))) != str(path):
        raise ManifestError(f"{shown}: expected a path in UTF-8: rename it, or link to it")
    return path


def read_manifest(
    path: StoragePath, prompt: str, allow_absolute: bool, keep: Sequence[str] = ()
) -> Iterator[dict[str, Any] | Reject]:
    """Yield rows with absolute `uri`, checked types and defaults, without audio measurements.

    keep: fields that become labels. Utterances of a tar that cannot be used are rejects.
    Raises ManifestError.
    """

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "labels": kept_fields(row, keep)}

    if path.suffix == ".tar":
        yield from tar_rows(path, labelled, prompt)
        return
    with path.open("rb") as lines:
        for position, row in json_lines(path, lines):
            if not {"audio", "messages"} & row.keys():
                raise ManifestError(
                    f"{position}: field 'audio' is missing, found {', '.join(row)}; `omni index` "
                    "reads cuts of lhotse and other names of fields"
                )
            try:
                yield checked_row(
                    path, position, labelled(row), prompt=prompt, allow_absolute=allow_absolute
                )
            except AddressError as error:
                yield Reject(id_of(path, position, row), "", "address", str(error))


def tar_rows(
    path: StoragePath, fields: Fields = dict, prompt: str = ""
) -> Iterator[dict[str, Any] | Reject]:
    """Yield the checked rows of a tar shard, and rejects. Raises ManifestError."""
    try:
        for row in read_tar(path, fields):
            yield row if isinstance(row, Reject) else checked_member(path, row, prompt)
    except TarError as error:
        raise ManifestError(str(error)) from None


def checked_member(
    path: StoragePath, row: dict[str, Any], prompt: str = ""
) -> dict[str, Any] | Reject:
    """Check a row of the tar at `path`, as `checked_row`; one that cannot be used is a reject."""
    try:
        return checked_row(path, f"{path}:{row['audio']}", row, prompt=prompt)
    except ManifestError as error:
        return Reject(str(row["id"]), str(path), "wrong field", str(error))


def checked_row(
    path: StoragePath,
    position: str,
    row: dict[str, Any],
    *,
    prompt: str = "",
    allow_absolute: bool = False,
) -> dict[str, Any]:
    """Turn a row of the manifest at `path` into one of the index, without measurements.

    row: where it has `bytes` (offset, length), its recording is that range of the manifest itself;
    where it has `labels` from `kept_fields`, the index keeps them.
    position: file and line (or member), for messages. Raises ManifestError, and AddressError for a
    row to be left out.
    """
    in_tar = isinstance(row.get("bytes"), tuple)  # no JSON value is a tuple
    conversation = _conversation(position, row) if "messages" in row and not in_tar else None
    messages, recordings = conversation or (None, [row])
    if messages is not None:
        row = {**row, "audio": recordings[0]["audio"], "text": answer_of(messages)}
    check_row(position, row)
    for recording in recordings:
        check_row(position, {**recording, "text": recording.get("text") or ""})
    try:
        locations = [_location(path, item, in_tar, allow_absolute) for item in recordings]
    except AddressError as error:
        raise AddressError(f"{position}: field 'audio': {error}") from None
    except ValueError as error:
        raise ManifestError(f"{position}: field 'audio': {error}") from None
    return {
        "id": id_of(path, position, row),
        **locations[0],
        "text": row["text"].strip(),
        "prompt": row.get("prompt") or prompt,
        "language": row.get("language"),
        "speaker": row.get("speaker"),
        "task": row.get("task"),
        "messages": None if messages is None else messages_json(messages),
        "audios": None
        if messages is None
        else [
            {**location, "text": item.get("text")}
            for location, item in zip(locations, recordings, strict=True)
        ],
        "labels": labels_json(position, row.get("labels")),
    }


def id_of(path: StoragePath, position: str, row: dict[str, Any]) -> str:
    """Return the id of a row of the manifest at `path`: its own, or one from its position."""
    if row.get("id") is not None:
        return str(row["id"])
    return position.replace(str(path), f"{path.parent.name}/{path.stem}")


def check_row(position: str, row: dict[str, Any]) -> None:
    """Check the fields of a manifest row. Raises ManifestError naming the field and its type."""
    for name in ("audio", "text"):
        if name not in row:
            raise ManifestError(f"{position}: field {name!r} is missing")
    for name, types in _TYPES.items():
        value = row.get(name)
        if not _is_storable(value):
            raise ManifestError(
                f"{position}: field {name!r}: expected a finite number or text without NUL and "
                f"lone surrogates, got {value!r}"
            )
        if value is None and name not in ("audio", "text"):
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join(t.__name__ for t in types)
            raise ManifestError(f"{position}: field {name!r}: expected {expected}, got {value!r}")
        if isinstance(value, (int, float)) and name != "id" and abs(value) > _LONGEST_SECONDS:
            raise ManifestError(
                f"{position}: field {name!r}: {value!r} seconds, longer than the longest "
                f"recording accepted ({_LONGEST_SECONDS:g} s)"
            )


def _conversation(position: str, row: dict[str, Any]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Parse a row's messages and recordings. Raises ManifestError."""
    if not _is_storable(json.dumps(row["messages"], ensure_ascii=False)):
        raise ManifestError(
            f"{position}: field 'messages': it contains characters that are not valid text "
            "(NUL or lone surrogates)"
        )
    try:
        return parse_messages(row)
    except ValueError as error:
        raise ManifestError(f"{position}: field 'messages': {error}") from None


def _location(
    path: StoragePath, row: dict[str, Any], in_tar: bool, allow_absolute: bool
) -> dict[str, Any]:
    """Locate a recording: file, range of bytes, span and stated duration in seconds.

    Raises ValueError for a path that the manifest may not name.
    """
    offset, length = row["bytes"] if in_tar else (None, None)
    is_span = row.get("offset") is not None and row.get("duration") is not None
    return {
        "uri": str(path) if in_tar else recording_uri(path.parent, row["audio"], allow_absolute),
        "offset": offset,
        "length": length,
        "start": float(row.get("offset") or 0.0),
        # Without an offset the utterance is the whole file, however long that really is.
        "duration": float(row["duration"]) if is_span else None,
        "stated_duration": stated_duration(row.get("offset"), row.get("duration")),
    }


def stated_duration(start: float | None, duration: float | None) -> float | None:
    """Return the seconds that a row states of its whole recording; None for a span, or nothing."""
    return float(duration) if start is None and duration is not None else None


def _is_storable(value: Any) -> bool:
    """Check for what neither a path nor a table can hold: NUL, lone surrogates, infinities."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    return not isinstance(value, float) or math.isfinite(value)
