"""Rows, parts and column names, shared by all sources of utterances."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from omni.audio.vad import Segmenting
from omni.corpus.audio_paths import AddressError, recording_uri
from omni.corpus.labels import kept_fields
from omni.corpus.lengths import DURATION_TOLERANCE
from omni.corpus.manifest import absolute
from omni.corpus.other_files import utf8_name
from omni.corpus.rejects import Reject
from omni.errors import ManifestError
from omni.storage.digest import digest
from omni.storage.http import DEFAULT_LIMITS, DownloadLimits
from omni.storage.path import ObjectPath, StoragePath, raise_if_unreachable
from omni.storage.uri import public_uri

COLUMNS = {
    "audio": ("audio", "audio_filepath", "audio_path", "path", "file", "wav"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text"),
    "id": ("id", "utt_id", "utterance_id"),
    "speaker": ("speaker", "speaker_id"),
    "language": ("language", "lang", "locale"),
    "prompt": ("prompt",),
    "task": ("task",),
    "offset": ("offset",),
    "duration": ("duration",),
}
_WORDS = ("id", "speaker", "language")  # fields whose numbers are taken as text


@dataclass(frozen=True)
class Options:
    """Options of reading a corpus. columns: the corpus's own name of a field in COLUMNS."""

    columns: Mapping[str, str] = field(default_factory=dict)
    language: str | None = None  # of rows without one
    audio_folder: str = ""  # prefix of audio paths, such as `clips` of Common Voice
    number_ids: bool = False  # ids from file and line instead of the rows' own
    rows_per_part: int = 1000
    allow_absolute: bool = False  # corpora may name files outside their own folder
    segment: Segmenting | None = None  # Rows may lack text; their long recordings are cut.
    rewrite_texts: bool = False  # texts are written anew: with `segment`, see `cut_rows`
    duration_tolerance: float = DURATION_TOLERANCE  # share of a stated duration that may be missing
    downloads: DownloadLimits = DEFAULT_LIMITS
    keep: tuple[str, ...] = ()  # the corpus's own names of columns that become labels

    @property
    def fingerprint(self) -> str:
        """Represent the options that change rows, without those that only cut them into parts."""
        settings: tuple[Any, ...] = (
            sorted(self.columns.items()), self.language, self.audio_folder, self.number_ids,
        )  # fmt: skip
        if self.segment is not None:
            settings = (*settings, self.segment)
        if self.rewrite_texts:
            settings = (*settings, "rewrite_texts")
        if self.duration_tolerance != DURATION_TOLERANCE:
            settings = (*settings, self.duration_tolerance)
        if self.downloads != DEFAULT_LIMITS:
            settings = (*settings, self.downloads)
        if self.keep:
            settings = (*settings, "keep", self.keep)
        return repr(settings)


@dataclass(frozen=True)
class Part:
    """A share of a source that one task reads: lines of a file, a shard, row groups.

    name: the same whenever the same corpus is cut the same way.
    fingerprint: changes when the part's content does.
    where: what `read` needs to find it.
    """

    name: str
    fingerprint: str
    where: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Row:
    """An utterance: text, speaker, and the location of its audio (or `data`, an encoded file).

    uri, offset, length: a file, or a range of its bytes. start, duration: seconds in the recording.
    stated_duration: seconds of the whole recording, where the corpus states them.
    messages, audios: of a conversation, as the index has them. labels: as `labels_json` makes them.
    error: reason and detail of a row that cannot be used; its location is then ignored.
    """

    id: str
    text: str = ""
    uri: str = ""
    offset: int | None = None
    length: int | None = None
    start: float = 0.0
    duration: float | None = None
    stated_duration: float | None = None
    prompt: str | None = None
    language: str | None = None
    speaker: str | None = None
    task: str | None = None
    messages: str | None = None
    audios: list[dict[str, Any]] | None = None
    labels: str | None = None
    data: bytes | None = None
    error: tuple[str, str] | None = None

    @classmethod
    def of_reject(cls, reject: Reject) -> Row:
        """Make the row of an utterance that cannot be used."""
        return cls(id=reject.id, uri=reject.uri, error=(reject.reason, reject.detail))


class Source(Protocol):
    """A corpus. It is pickled into every task, so it holds names and settings but no open file."""

    spec: str

    def parts(self) -> list[Part]:
        """List the parts in order. Raises ManifestError."""
        ...

    def read(self, part: Part) -> Iterator[Row]:
        """Yield the rows of a part. Raises ManifestError naming file, row and field."""
        ...


def source_of_part(source: Source, part: Part) -> Source:
    """Return a source that reads `part` alike, without what only its other parts need.

    A source that lists its files has a method `narrowed`: the list is as long as the corpus, and
    would travel to every task.
    """
    narrowed = getattr(source, "narrowed", None)
    return source if narrowed is None else narrowed(part)


def manifest_fields(row: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Rename a row's fields to those of a manifest; `labels` holds those of `options.keep`."""
    found: dict[str, Any] = {"labels": kept_fields(row, options.keep)}
    for name, usual in COLUMNS.items():
        candidates = (options.columns[name],) if name in options.columns else usual
        column = next((c for c in candidates if c in row), None)
        if column is not None:
            value = row[column]
            number = isinstance(value, int) and not isinstance(value, bool)
            found[name] = str(value) if name in _WORDS and number else value
    if options.audio_folder and isinstance(found.get("audio"), str):
        found["audio"] = f"{options.audio_folder}/{found['audio']}"
    if found.get("language") is None:
        found["language"] = options.language
    unnamed = "text" in found or "text" not in options.columns
    if options.segment and unnamed and found.get("text") is None:
        found["text"] = ""
    return found


def explain_missing(name: str, columns: list[str], options: Options) -> str:
    """Say which column was expected and which there are."""
    wanted = options.columns.get(name) or " or ".join(COLUMNS[name])
    return (
        f"field {name!r} is missing: expected a column {wanted} (--{name}_column names another), "
        f"found {', '.join(columns)}"
    )


def resolve_audio(position: str, folder: StoragePath, name: str, options: Options) -> str:
    """Resolve an audio path of a corpus in `folder`.

    Raises ManifestError for one that the settings do not admit, and AddressError.
    """
    try:
        return recording_uri(folder, name, options.allow_absolute)
    except AddressError:
        raise
    except ValueError as error:
        raise ManifestError(f"{position}: {error}") from None


def file_fingerprint(path: StoragePath) -> str:
    """Return size and time of a file as text."""
    try:
        status = path.stat()
    except OSError as error:
        raise_if_unreachable(path, error)
        raise ManifestError(f"{path}: {error.strerror}") from None
    return f"{status.st_size} {status.st_mtime_ns}"


def fingerprint_of(*parts: Any) -> str:
    """Hash the `repr` of the parts."""
    return digest(repr(parts))


def files_of(spec: str, suffixes: tuple[str, ...]) -> list[StoragePath]:
    """List the files of a path, of a folder (at any depth), or of a pattern."""
    path = absolute(spec)
    found: list[StoragePath]
    if path.is_dir():
        found = [path / n for n in sorted(names_within(path)) if n.endswith(suffixes)]
    elif path.is_file():
        found = [path]
    else:
        found = _matching(path)
    if not found:
        raise ManifestError(
            f"{public_uri(spec)}: expected a file, a folder or a pattern of *{suffixes[0]}"
        )
    return found


@dataclass
class Links:
    """Links in a folder that are not followed."""

    dangling: list[str] = field(default_factory=list)
    """To nothing, or to themselves."""
    repeated: list[str] = field(default_factory=list)
    """To a folder that is read already, or that they lie in."""


def names_within(folder: StoragePath, links: Links | None = None) -> dict[str, str]:
    """Map the relative name of each file in a folder, at any depth, to its size and time.

    Links to other folders are followed, and every folder is read once. links: gets those that are
    not followed. Raises ManifestError for a folder that cannot be listed.
    """
    if isinstance(folder, ObjectPath):
        found = folder.files_within()
        return {name: repr((info.size, info.mtime_ns)) for name, info in found.items()}
    names: dict[str, str] = {}
    links = Links() if links is None else links
    for base, files in _walk(folder, links):
        for file in files:
            path = os.path.join(base, file)
            name = os.path.relpath(path, folder)
            try:
                status = os.stat(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise ManifestError(f"{utf8_name(path)}: {error.strerror}") from None
                links.dangling.append(name)
            else:
                names[name] = repr((status.st_size, status.st_mtime_ns))
    return names


def _walk(folder: Path, links: Links) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `folder`, and its files; those that links lead to come last."""

    def fail(error: OSError) -> None:
        raise ManifestError(f"{utf8_name(str(error.filename))}: {error.strerror}")

    seen: set[str] = set()
    pending = [str(folder)]
    while pending:
        top = pending.pop(0)
        target = os.path.realpath(top)
        around = os.path.realpath(os.path.dirname(top)) + os.sep
        if top != str(folder) and (
            target in seen or around.startswith(target.rstrip(os.sep) + os.sep)
        ):
            links.repeated.append(os.path.relpath(top, folder))
            continue
        for base, folders, files in os.walk(top, onerror=fail):
            real = os.path.realpath(base)
            if real in seen:  # A link led to it before one led to the folder around it.
                folders.clear()
                continue
            seen.add(real)
            linked = [n for n in sorted(folders) if os.path.islink(os.path.join(base, n))]
            pending += [os.path.join(base, name) for name in linked]
            yield base, files


def _matching(path: StoragePath) -> list[StoragePath]:
    if isinstance(path, ObjectPath):
        fixed = path
        while any(mark in str(fixed.path) for mark in "*["):
            fixed = fixed.parent
        pattern = str(path.path.relative_to(fixed.path))
        names = (n for n in sorted(fixed.files_within()) if PurePosixPath(n).match(pattern))
        return [fixed / name for name in names if name.count("/") == pattern.count("/")]
    anchor = Path(path.anchor)
    return sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file())
