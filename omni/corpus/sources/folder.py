"""Read a folder of recordings, each with its text in a .txt file of the same name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from omni.audio.formats import is_audio
from omni.corpus.manifest import check_row
from omni.corpus.other_files import (
    NOT_A_RECORDING,
    OtherFiles,
    is_document,
    is_system_file,
    utf8_name,
)
from omni.corpus.rejects import Reject
from omni.corpus.sources.base import Links, Options, Part, Row, fingerprint_of, names_within
from omni.corpus.text_file import decode_text
from omni.errors import ManifestError
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, raise_if_unreachable

_TEXT = ".txt"
_OTHERS = "other-files"  # name of the part that tells of files without an utterance


class FolderSource:
    """clips/0001.flac and clips/0001.txt, at any depth. A part is some of the recordings.

    A text belongs to the recording of the same name; to a file of any other kind, if that is the
    only one. A recording without a text, and a text without a recording, are rejects.
    """

    def __init__(self, spec: str, folder: StoragePath, options: Options) -> None:
        self.spec, self.folder, self.options = spec, folder, options

    def parts(self) -> list[Part]:
        links = Links()
        marks = names_within(self.folder, links)
        rows, others = _sort(marks)
        if not any(not _is_text(name) for name in rows):
            raise ManifestError(f"{self.spec}: no recordings with a .txt of the same name")
        found = [(name, f"{marks[name]} {marks.get(_stem(name) + _TEXT)}") for name in rows]
        step = self.options.rows_per_part
        parts = []
        for first in range(0, len(found), step):
            share = found[first : first + step]
            names = tuple(name for name, _ in share)
            parts.append(Part(f"files-{first:09}", fingerprint_of(share), names))
        rejects = [*others.rejects(str(self.folder)), *_of_links(str(self.folder), links)]
        if rejects:
            parts.append(Part(_OTHERS, fingerprint_of(rejects), tuple(rejects)))
        return parts

    def read(self, part: Part) -> Iterator[Row]:
        if part.name == _OTHERS:
            yield from map(Row.of_reject, part.where)
        else:
            yield from parallel_map(self._row, part.where)

    def _row(self, name: str) -> Row:
        path = self.folder / name
        shown, identity = utf8_name(str(path)), utf8_name(_stem(name))
        if shown != str(path):
            return _reject(identity, shown, "file name", "expected a name in UTF-8")
        if _is_text(name):
            return _reject(identity, shown, "no audio", f"{shown}: no recording of this name")
        row = {"id": identity, "audio": shown}
        try:
            text = self._text(path)
            if text is not None:
                row["text"] = decode_text(f"{path.with_suffix(_TEXT)}", text).strip()
                check_row(str(path.with_suffix(_TEXT)), row)
        except OSError as error:
            raise_if_unreachable(path, error)
            return _reject(identity, shown, "unreadable text", f"{error.filename}: {error}")
        except ManifestError as error:
            return _reject(identity, shown, "unreadable text", str(error))
        if text is None and not self.options.segment:
            missing = f"{path.with_suffix(_TEXT)}: no such file"
            return _reject(identity, shown, "no text", missing)
        language = self.options.language
        return Row(id=identity, text=row.get("text", ""), uri=shown, language=language)

    def _text(self, path: StoragePath) -> bytes | None:
        """Read the text beside a recording; None where there is none."""
        for suffix in (_TEXT, _TEXT.upper()):
            try:
                return path.with_suffix(suffix).read_bytes()
            except FileNotFoundError:
                continue
        return None


def _of_links(uri: str, links: Links) -> list[Reject]:
    """Return an entry for each kind of links that are not followed; uri: the folder."""
    kinds = (("links to nothing", links.dangling), ("links to folders read once", links.repeated))
    return [
        Reject(kind, uri, NOT_A_RECORDING, f"{len(names):,}, such as {utf8_name(min(names))}")
        for kind, names in kinds
        if names
    ]


def _sort(names: Iterable[str]) -> tuple[list[str], OtherFiles]:
    """Separate rows, in order (recordings, and texts without one), from other files."""
    others = OtherFiles()
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if is_system_file(name):
            others.add(name)
        else:
            stems[_stem(name)].append(name)
    rows: list[str] = []
    for stem, files in stems.items():
        texts = [name for name in files if _is_text(name)]
        recordings = [name for name in files if is_audio(name)]
        unknown = [name for name in files if name not in texts and name not in recordings]
        if recordings:
            rows += recordings
        elif texts and len(unknown) == 1 and not is_document(stem):
            rows += unknown
        elif texts and not is_document(stem):
            rows += texts
        else:
            for name in files:
                others.add(name)
    return sorted(rows), others


def _stem(name: str) -> str:
    """Return a name without its ending; one without an ending stays whole."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.rpartition(".")
    return folder + slash + (stem if dot and stem else base)


def _is_text(name: str) -> bool:
    return name.lower().endswith(_TEXT)


def _reject(name: str, uri: str, reason: str, detail: str) -> Row:
    return Row(id=name, uri=uri, error=(reason, detail))
