"""Read a folder of recordings, each with its text in a .txt file of the same name."""

from __future__ import annotations

from collections.abc import Iterator

from omni.corpus.manifest import ManifestError, check_row
from omni.corpus.sources.base import Options, Part, Row, fingerprint_of, names_within
from omni.corpus.tar import AUDIO_SUFFIXES
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, raise_if_unreachable


class FolderSource:
    """clips/0001.flac and clips/0001.txt, at any depth. A part is some of the recordings."""

    def __init__(self, spec: str, folder: StoragePath, options: Options) -> None:
        self.spec, self.folder, self.options = spec, folder, options

    def parts(self) -> list[Part]:
        found = sorted(_recordings(self.folder))
        if not found:
            raise ManifestError(f"{self.spec}: no recordings with a .txt of the same name")
        step = self.options.rows_per_part
        parts = []
        for first in range(0, len(found), step):
            share = found[first : first + step]
            names = tuple(name for name, _ in share)
            parts.append(Part(f"files-{first:09}", fingerprint_of(share), names))
        return parts

    def read(self, part: Part) -> Iterator[Row]:
        yield from parallel_map(self._row, part.where)

    def _row(self, name: str) -> Row:
        path = self.folder / name
        text = path.with_suffix(".txt")
        row = {"id": name.rpartition(".")[0], "audio": str(path)}
        try:
            row["text"] = text.read_bytes().decode("utf-8-sig").strip()
        except FileNotFoundError:
            if self.options.segment:
                return Row(id=row["id"], uri=str(path), language=self.options.language)
            return Row(id=row["id"], uri=str(path), error=("no text", f"{text}: no such file"))
        except (OSError, UnicodeDecodeError) as error:
            raise_if_unreachable(text, error)
            raise ManifestError(f"{text}: expected UTF-8 text: {error}") from None
        check_row(str(text), row)
        return Row(id=row["id"], text=row["text"], uri=str(path), language=self.options.language)


def _recordings(folder: StoragePath) -> Iterator[tuple[str, str]]:
    """Yield the relative name of each recording, with size and time of it and of its text."""
    marks = names_within(folder)
    for name, mark in marks.items():
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() in AUDIO_SUFFIXES:
            yield name, f"{mark} {marks.get(f'{stem}.txt')}"
