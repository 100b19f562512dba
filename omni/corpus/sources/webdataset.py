"""Read tar shards of WebDataset and of lhotse Shar in position, by byte range."""

from __future__ import annotations

import copy
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from omni.corpus.manifest import checked_member, tar_rows
from omni.corpus.other_files import NOT_A_RECORDING, is_system_file
from omni.corpus.rejects import Reject
from omni.corpus.sources.base import Options, Part, Row, file_fingerprint, manifest_fields
from omni.corpus.sources.jsonl_csv import json_objects
from omni.corpus.sources.lhotse import row_of_cut
from omni.corpus.tar import TarError, read_members, refuse_unsafe
from omni.errors import ManifestError
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, raise_if_unreachable
from omni.storage.uri import redact


def member_fields(row: dict[str, Any], options: Options) -> dict[str, Any]:
    """Rename the fields of a tar's row to those of a manifest; its audio is a member."""
    return manifest_fields({k: v for k, v in row.items() if k != "audio"}, options)


class TarSource:
    """WebDataset tars; a part is one of them. `0001.flac` with `0001.txt` or `0001.json`."""

    def __init__(self, spec: str, paths: list[StoragePath], options: Options) -> None:
        self.spec, self.options = spec, options
        self.paths = dict(enumerate(paths))

    def narrowed(self, part: Part) -> TarSource:
        """See `source_of_part`."""
        narrow = copy.copy(self)
        narrow.paths = {part.where[0]: self.paths[part.where[0]]}
        return narrow

    def parts(self) -> list[Part]:
        paths = list(self.paths.values())
        return [
            Part(f"{path.name}-{n:05}", mark, (n,))
            for n, (path, mark) in enumerate(
                zip(paths, parallel_map(file_fingerprint, paths), strict=True)
            )
        ]

    def read(self, part: Part) -> Iterator[Row]:
        path = self.paths[part.where[0]]
        if is_system_file(path.name):
            yield Row.of_reject(Reject(path.name, str(path), NOT_A_RECORDING, "not a shard"))
            return
        for found in tar_rows(path, lambda row: member_fields(row, self.options)):
            yield Row.of_reject(found) if isinstance(found, Reject) else Row(**found)


def rows_of_tar(url: str, options: Options) -> Iterator[Row]:
    """Yield the rows of a tar or .tar.gz of a dataset, on disk or on a server.

    Of an uncompressed tar on disk, recordings are ranges of its bytes; of any other, they are data
    inside the rows. Raises ManifestError, and OSError for a server that does not answer.
    """
    if "://" not in url and not url.endswith(".gz"):
        for found in tar_rows(Path(url), lambda row: member_fields(row, options)):
            yield Row.of_reject(found) if isinstance(found, Reject) else Row(**found)
        return
    with tempfile.TemporaryFile(prefix="omni-tar-") as local:
        with fsspec.open(url, "rb", compression="infer") as file:
            shutil.copyfileobj(file, local, 8 << 20)
        local.seek(0)
        name = redact(url)
        try:
            members = read_members(name, local, lambda row: member_fields(row, options))
            for member in members:
                found = member
                if not isinstance(member, Reject):
                    found = checked_member(Path(name), member)
                if isinstance(found, Reject):
                    yield Row.of_reject(found)
                    continue
                local.seek(found["offset"])
                data = local.read(found["length"])
                yield Row(**{**found, "uri": "", "offset": None, "length": None}, data=data)
        except TarError as error:
            raise ManifestError(str(error)) from None


class SharSource:
    """lhotse Shar: cuts.000000.jsonl.gz beside recording.000000.tar. A part is one shard."""

    def __init__(self, spec: str, folder: StoragePath, options: Options) -> None:
        self.spec, self.folder, self.options = spec, folder, options

    def parts(self) -> list[Part]:
        parts = []
        found: list[StoragePath] = [*self.folder.glob("cuts.*.jsonl*")]
        for cuts in sorted(found, key=str):
            number = cuts.name.split(".")[1]
            shard = self.folder / f"recording.{number}.tar"
            if not shard.is_file():
                raise ManifestError(f"{cuts}: expected {shard.name} beside it")
            mark = f"{file_fingerprint(cuts)} {file_fingerprint(shard)}"
            parts.append(Part(f"shard-{number}", mark, (cuts.name, shard.name)))
        return parts

    def read(self, part: Part) -> Iterator[Row]:
        cuts, shard = (self.folder / name for name in part.where)
        whole = Part("", "", (0, -1, 1))
        recordings = _recordings(shard)
        for position, cut in json_objects(cuts, whole):
            name, offset, length = next(recordings, ("", 0, 0))
            if name.rpartition(".")[0] != str(cut.get("id")):
                raise ManifestError(
                    f"{position}: expected its recording at the same position in {shard.name}, "
                    f"found {name or 'nothing'}"
                )
            yield row_of_cut(position, cut, self.options, (str(shard), offset, length))


def _recordings(path: StoragePath) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and length of each audio file of a shard."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                refuse_unsafe(path, member)
                shard.members = []  # type: ignore[attr-defined]  # Otherwise it keeps them all.
                if member.isfile() and not member.name.endswith((".json", ".nometa")):
                    yield member.name, member.offset_data, member.size
    except TarError as error:
        raise ManifestError(str(error)) from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise_if_unreachable(path, error)
        raise ManifestError(f"{path}: expected an uncompressed tar: {error}") from None
