"""Read tar shards of WebDataset in place: members with one basename are one utterance.

    a/0001.flac  a/0001.txt                 audio and text, or
    a/0002.wav   a/0002.json                audio and the fields of a manifest row

A member is only ever a range of bytes of the shard. Nothing is extracted, so no name in an archive
can become a path. Absolute names and names with .. are refused all the same.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from omni.storage.path import StoragePath

AUDIO_SUFFIXES = {"wav", "flac", "ogg", "opus", "mp3", "aiff", "aif", "au", "caf", "w64"}


class TarError(ValueError):
    """A shard cannot be used; the message names it, the member, and what was expected."""


def read_tar(
    path: StoragePath, fields: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Iterator[dict[str, Any]]:
    """Yield manifest rows in the shard's order. `audio` is the name of the member, `bytes` its
    (offset, length) in the shard. fields: renames a row's own fields to those of a manifest.

    Raises TarError: not a tar, damaged, compressed, an unsafe member, or a row without its parts.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            parts: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in shard:
                refuse_unsafe(path, member)
                if member.isfile():
                    key, suffix = _split(member.name)
                    parts.setdefault(key, {})[suffix] = member
            for key, files in parts.items():
                yield _row(path, shard, key, files, fields)
    except (tarfile.TarError, EOFError) as error:
        raise TarError(f"{path}: expected an uncompressed tar: {error}") from None


def refuse_unsafe(path: StoragePath, member: tarfile.TarInfo) -> None:
    """Raise TarError for a member outside the archive, and for links and devices."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise TarError(f"{path}: the member {member.name!r} points outside the archive")
    if not (member.isfile() or member.isdir()):
        raise TarError(f"{path}: the member {member.name!r} is a link or a device, not a file")


def _split(name: str) -> tuple[str, str]:
    """Split a name into WebDataset's key and suffix, at the first dot of the basename."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _row(
    path: StoragePath,
    shard: tarfile.TarFile,
    key: str,
    files: dict[str, tarfile.TarInfo],
    fields: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    audio = [member for suffix, member in files.items() if suffix in AUDIO_SUFFIXES]
    if len(audio) != 1:
        raise TarError(f"{path}: {key!r} has {len(audio)} audio members, expected one")
    row: dict[str, Any] = {"id": key}
    try:
        if "json" in files:
            found = json.loads(_read(shard, files["json"]))
            if not isinstance(found, dict):
                raise ValueError("expected an object")
            row |= found
        if "txt" in files:
            row["text"] = _read(shard, files["txt"]).decode()
    except ValueError as error:  # includes UnicodeDecodeError
        raise TarError(f"{path}: {key!r}: {error}") from None
    row = fields(row)
    if "text" not in row:
        raise TarError(f"{path}: {key!r} has no text: expected {key}.txt, or text in {key}.json")
    return {**row, "audio": audio[0].name, "bytes": (audio[0].offset_data, audio[0].size)}


def _read(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None  # The member is a regular file.
    return file.read()
