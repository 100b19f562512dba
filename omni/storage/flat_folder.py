"""Read and write a folder of small immutable files, on disk or in object storage.

A file appears whole or not at all: on disk it is renamed once written, and so is a large object
(omni/storage/publish.py).
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from omni.storage.atomic import write_atomic
from omni.storage.path import as_path
from omni.storage.publish import write_object

_OPEN_FILES = 32
_LIST_SECONDS = 10.0  # between two listings of a bucket


class Folder(Protocol):
    """Operations on a folder that the feature cache needs. Failures are OSError."""

    location: str

    def changed(self) -> bool:
        """Tell cheaply whether a new listing may differ from the last one."""
        ...

    def list(self) -> dict[str, int]:
        """Return the size of each file in bytes, by name; empty if there is no folder."""
        ...

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes: ...

    def write(self, name: str, data: bytes) -> None: ...


def open_folder(location: str | Path) -> Folder:
    """Open a folder by its local path or URI. Raises StorageError."""
    where = as_path(location)
    if isinstance(where, Path):
        return LocalFolder(where)
    return ObjectFolder(str(where), *where.filesystem)


class LocalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self._listed_ns = -1
        self._files: OrderedDict[str, int] = OrderedDict()

    def changed(self) -> bool:
        try:
            changed_ns = os.stat(self.path).st_mtime_ns
        except OSError:
            return False
        # File systems round times: a folder that changed just now may change again unnoticed.
        if changed_ns == self._listed_ns and time.time_ns() - changed_ns > 2_000_000_000:
            return False
        self._listed_ns = changed_ns
        return True

    def list(self) -> dict[str, int]:
        sizes = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    try:
                        sizes[entry.name] = entry.stat().st_size
                    except OSError:  # It was renamed since.
                        continue
        except OSError:
            return {}
        return sizes

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is None:
            with (self.path / name).open("rb") as file:
                file.seek(offset)
                return file.read()
        return os.pread(self._file(name), length, offset)

    def write(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / name, data)

    def _file(self, name: str) -> int:
        """Return an open descriptor, kept because the utterances of a shard are read singly."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        descriptor = os.open(self.path / name, os.O_RDONLY)
        self._files[name] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


class ObjectFolder:
    def __init__(self, location: str, filesystem: pafs.FileSystem, path: str) -> None:
        self.location = location
        self._filesystem, self._path = filesystem, path.rstrip("/")
        self._listed_at = -_LIST_SECONDS
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()

    def changed(self) -> bool:
        return time.monotonic() - self._listed_at >= _LIST_SECONDS

    def list(self) -> dict[str, int]:
        self._listed_at = time.monotonic()
        selector = pafs.FileSelector(self._path, allow_not_found=True)
        return {info.base_name: info.size or 0 for info in self._filesystem.get_file_info(selector)}

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            self._files[name] = self._filesystem.open_input_file(f"{self._path}/{name}")
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        file = self._files[name]
        return bytes(file.read_at(file.size() - offset if length is None else length, offset))

    def write(self, name: str, data: bytes) -> None:
        write_object(self._filesystem, f"{self._path}/{name}", data)
