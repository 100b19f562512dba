"""A folder of recordings, each with its text in a .txt file of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from omni.data.index import ManifestError, check_row
from omni.data.sources.base import Options, Part, Row, digest
from omni.data.tar import AUDIO_SUFFIXES


class FolderSource:
    """clips/0001.flac and clips/0001.txt, at any depth. A part is some of the recordings."""

    def __init__(self, spec: str, folder: Path, options: Options) -> None:
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
            parts.append(Part(f"files-{first:09}", digest(share), names))
        return parts

    def read(self, part: Part) -> Iterator[Row]:
        for name in part.where:
            path = self.folder / name
            text = path.with_suffix(".txt")
            row = {"id": str(Path(name).with_suffix("")), "audio": str(path)}
            try:
                row["text"] = text.read_text(encoding="utf-8-sig").strip()
            except FileNotFoundError:
                if self.options.segment:
                    yield Row(id=row["id"], uri=str(path), language=self.options.language)
                    continue
                yield Row(id=row["id"], uri=str(path), error=("no text", f"{text}: no such file"))
                continue
            except (OSError, UnicodeDecodeError) as error:
                raise ManifestError(f"{text}: expected UTF-8 text: {error}") from None
            check_row(str(text), row)
            yield Row(id=row["id"], text=row["text"], uri=str(path), language=self.options.language)


def _recordings(folder: Path) -> Iterator[tuple[str, str]]:
    """Name of each recording, relative to the folder, and what changes with it or its text."""
    sizes: dict[str, os.stat_result] = {}
    for base, _, names in os.walk(folder, followlinks=True):
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() in AUDIO_SUFFIXES or suffix == "txt":
                sizes[os.path.join(base, name)] = os.stat(os.path.join(base, name))
    for path, status in sizes.items():
        stem, _, suffix = path.rpartition(".")
        if suffix == "txt":
            continue
        text = sizes.get(f"{stem}.txt")
        stats = [(s.st_size, s.st_mtime_ns) for s in (status, text) if s is not None]
        yield os.path.relpath(path, folder), repr(stats)
