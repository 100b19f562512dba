"""Read tar shards of WebDataset in place: members with one basename are one utterance.

    a/0001.flac  a/0001.txt                 audio and text, or
    a/0002.wav   a/0002.json                audio and the fields of a manifest row

A member is only ever a range of bytes of the shard. Nothing is extracted, so no name in an archive
can become a path. Absolute names and names with .. are refused all the same.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from omni.audio.formats import AUDIO_ENDINGS
from omni.corpus.other_files import OtherFiles, is_document, is_system_file, utf8_name
from omni.corpus.rejects import Reject
from omni.corpus.text_file import decode_text, json_object
from omni.errors import ManifestError
from omni.storage.path import StoragePath

_TEXTS = ("txt", "json")
Members = dict[str, tarfile.TarInfo]  # of one utterance, by suffix
Fields = Callable[[dict[str, Any]], dict[str, Any]]


class TarError(ValueError):
    """A shard cannot be used; the message names it, the member, and what was expected."""


def read_tar(path: StoragePath, fields: Fields = dict) -> Iterator[dict[str, Any] | Reject]:
    """Yield manifest rows in the shard's order, and rejects (see `read_members`).

    fields: renames a row's own fields to those of a manifest.
    """
    with path.open("rb") as file:
        yield from read_members(str(path), file, fields)


def read_members(
    path: str, file: IO[bytes], fields: Fields = dict
) -> Iterator[dict[str, Any] | Reject]:
    """Yield the rows of an open, uncompressed tar. path: its name, for messages.

    `audio` of a row is the name of the member, `bytes` its (offset, length) in the tar.

    Raises TarError: not a tar, damaged, compressed, an unsafe member, or a key that occurs twice.
    """
    others = OtherFiles()
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            utterances: dict[str, Members] = {}
            for member in shard:
                refuse_unsafe(path, member)
                if member.isfile() and is_system_file(member.name):
                    others.add(member.name)
                elif member.isfile():
                    _add(path, utterances, member)
            for key, members in utterances.items():
                if not any(map(is_recording, members)) and (
                    is_document(key) or not any(suffix in _TEXTS for suffix in members)
                ):
                    for member in members.values():
                        others.add(member.name)
                    continue
                try:
                    yield _row(path, shard, key, members, fields)
                except _BadRow as error:
                    yield Reject(utf8_name(key), utf8_name(path), *error.args)
    except (tarfile.TarError, EOFError) as error:
        raise TarError(f"{path}: expected an uncompressed tar: {error}") from None
    yield from others.rejects(path)


def refuse_unsafe(path: str | StoragePath, member: tarfile.TarInfo) -> None:
    """Raise TarError for a member outside the archive, and for links and devices."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise TarError(f"{path}: the member {member.name!r} points outside the archive")
    if not (member.isfile() or member.isdir()):
        raise TarError(f"{path}: the member {member.name!r} is a link or a device, not a file")


def is_recording(suffix: str) -> bool:
    """Check a suffix, which may have several words: flac, mic1.flac."""
    return suffix.rpartition(".")[2] in AUDIO_ENDINGS


class _BadRow(ValueError):
    """One utterance cannot be used: reason and detail of its reject."""


def _add(path: str, utterances: dict[str, Members], member: tarfile.TarInfo) -> None:
    """Sort a member into its utterance, by WebDataset's key: the name up to its first dot."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    key, suffix = folder + slash + stem, suffix.lower()
    members = utterances.setdefault(key, {})
    if suffix in members:
        raise TarError(
            f"{path}: the key {key!r} occurs twice: {members[suffix].name!r} and {member.name!r}; "
            "keys must differ"
        )
    members[suffix] = member


def _row(
    path: str, shard: tarfile.TarFile, key: str, members: Members, fields: Fields
) -> dict[str, Any]:
    """Make a manifest row of an utterance's members. Raises _BadRow."""
    names = ", ".join(utf8_name(member.name) for member in members.values())
    if utf8_name(key) != key:
        raise _BadRow("file name", f"expected names in UTF-8, found {names}")
    audio = [member for suffix, member in members.items() if is_recording(suffix)]
    if not audio:  # A single member of an unknown kind may still be one.
        unknown = [member for suffix, member in members.items() if suffix not in _TEXTS]
        audio = unknown if len(unknown) == 1 else []
    if len(audio) != 1:
        reason = "several recordings" if audio else "no audio"
        detail = f"expected one recording of the key {key!r} (names up to the first dot)"
        raise _BadRow(reason, f"{detail}, found {names}")
    row: dict[str, Any] = {"id": key}
    try:
        if "json" in members:
            name = f"{path}:{members['json'].name}"
            row |= json_object(name, decode_text(name, _read(shard, members["json"])))
        if "txt" in members:
            name = f"{path}:{members['txt'].name}"
            row["text"] = row["txt"] = decode_text(name, _read(shard, members["txt"]))
    except ManifestError as error:
        raise _BadRow("unreadable text", str(error)) from None
    row = fields(row)
    if "text" not in row:
        raise _BadRow("no text", f"expected {key}.txt, or text in {key}.json, found {names}")
    return {**row, "audio": audio[0].name, "bytes": (audio[0].offset_data, audio[0].size)}


def _read(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None  # The member is a regular file.
    return file.read()
