"""Read and write a folder of small immutable files, on disk or in object storage.

A file appears whole or not at all: on disk it is renamed once written, and so is a large object
(omni/storage/publish.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from omni.storage.atomic import write_atomic
from omni.storage.digest import digest
from omni.storage.filesystem import REQUESTS_AT_ONCE
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import ObjectPath, as_path
from omni.storage.publish import write_object

_OPEN_FILES = 32
_OPEN_OBJECTS = 4096  # An open object is a few hundred bytes, and opening one is a request.
_READS_AT_ONCE = 32
"""Reads of a network file system that are under way."""
_SLOW_SECONDS = 0.002  # From here on, reads of a file system are made in parallel.
_LIST_SECONDS = 10.0  # between two listings of a bucket
_DOWNLOAD_BYTES = 32 << 20
"""Bytes of one request when a whole file is copied to this node."""
_UNUSED_SECONDS = 7 * 86_400.0


@dataclass(frozen=True)
class Range:
    """`length` bytes of a file from `offset` on."""

    name: str
    offset: int
    length: int


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

    def read_ranges(self, ranges: Sequence[Range]) -> Sequence[bytes | OSError]:
        """Read ranges of files, many at a time; a failure stands in the place of its range."""
        ...

    def write(self, name: str, data: bytes) -> None: ...

    def upload(self, name: str, source: Path) -> None:
        """Move a file of this machine into the folder."""
        ...

    def spool(self) -> Path:
        """Return a new path of this machine for a file that `upload` will move."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def modified(self, name: str) -> float:
        """Return the time of a file's last change, in seconds since 1970."""
        ...

    def local_copy(self, name: str, size: int) -> Path:
        """Return a path of this machine with the content of a file, for mapping it."""
        ...


def open_folder(location: str | Path) -> Folder:
    """Open a folder by its local path or URI. Raises StorageError."""
    where = as_path(location)
    if isinstance(where, Path):
        return LocalFolder(where)
    return ObjectFolder(where)


class LocalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self._listed_ns = -1
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._lock = threading.Lock()

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
                    except FileNotFoundError:  # It was renamed since.
                        continue
        except FileNotFoundError:
            return {}
        return sizes

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is None:
            with (self.path / name).open("rb") as file:
                file.seek(offset)
                return file.read()
        shard = self._file(name)  # Held while it is read, for another thread may let go of it.
        return os.pread(shard.fileno(), length, offset)

    def read_ranges(self, ranges: Sequence[Range]) -> Sequence[bytes | OSError]:
        began = time.perf_counter()
        done = [_attempt(self.read, part) for part in ranges[:1]]
        # A local disk answers sooner than threads start; a network file system does not.
        threads = _READS_AT_ONCE if time.perf_counter() - began > _SLOW_SECONDS else 0
        rest = ranges[1:]
        if threads and len(rest) > 1:
            return [*done, *parallel_map(lambda part: _attempt(self.read, part), rest, threads)]
        return done + [_attempt(self.read, part) for part in rest]

    def write(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / name, data)

    def upload(self, name: str, source: Path) -> None:
        with source.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(source, self.path / name)

    def spool(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / f".{uuid.uuid4().hex}.tmp"

    def delete(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)
        (self.path / name).unlink(missing_ok=True)

    def modified(self, name: str) -> float:
        return (self.path / name).stat().st_mtime

    def local_copy(self, name: str, size: int) -> Path:
        return self.path / name

    def _file(self, name: str) -> FileIO:
        """Return an open file, kept because the utterances of a shard are read singly.

        One that leaves the list is closed once no thread reads it any more.
        """
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = FileIO(self.path / name)
        with self._lock:
            self._files[name] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file


class ObjectFolder:
    def __init__(self, where: ObjectPath) -> None:
        self.location, self._where = str(where), where
        self._filesystem, path = where.filesystem
        self._path = path.rstrip("/")
        self._listed_at = -_LIST_SECONDS
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()

    def changed(self) -> bool:
        return time.monotonic() - self._listed_at >= _LIST_SECONDS

    def list(self) -> dict[str, int]:
        self._listed_at = time.monotonic()
        selector = pafs.FileSelector(self._path, allow_not_found=True)
        return {info.base_name: info.size or 0 for info in self._filesystem.get_file_info(selector)}

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        file = self._file(name)
        return bytes(file.read_at(file.size() - offset if length is None else length, offset))

    def read_ranges(self, ranges: Sequence[Range]) -> Sequence[bytes | OSError]:
        if len(ranges) > 1:
            # Opening asks for the size, once for each object that this process reads.
            names = dict.fromkeys(part.name for part in ranges)
            for _ in parallel_map(self._try_opening, names, REQUESTS_AT_ONCE):
                pass
        return list(parallel_map(lambda part: _attempt(self.read, part), ranges, REQUESTS_AT_ONCE))

    def _try_opening(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._file(name)

    def _file(self, name: str) -> pa.NativeFile:
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = self._filesystem.open_input_file(f"{self._path}/{name}")
        with self._lock:
            self._files[name] = file
            if len(self._files) > _OPEN_OBJECTS:
                self._files.popitem(last=False)
        return file

    def write(self, name: str, data: bytes) -> None:
        target = self._where / name
        write_object(self._filesystem, target.filesystem[1], data, target.take_name)

    def upload(self, name: str, source: Path) -> None:
        (self._where / name).upload(source)
        source.unlink()

    def spool(self) -> Path:
        return Path(tempfile.gettempdir()) / f"omni-spool-{uuid.uuid4().hex}"

    def delete(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)
        self._filesystem.delete_file(f"{self._path}/{name}")

    def modified(self, name: str) -> float:
        changed: datetime | None = self._filesystem.get_file_info(f"{self._path}/{name}").mtime
        return time.time() if changed is None else changed.timestamp()

    def local_copy(self, name: str, size: int) -> Path:
        """Download the file once for all processes of this node and user.

        Copies of other files of the folder that nobody has used for a week are removed.
        """
        folder = _node_folder() / digest(self.location)
        folder.mkdir(exist_ok=True)
        copy = folder / name
        with FileLock(f"{folder}.lock"):
            if not (copy.is_file() and copy.stat().st_size == size):
                partial = folder / f"{name}.tmp"
                file = self._filesystem.open_input_file(f"{self._path}/{name}")
                starts = range(0, size, _DOWNLOAD_BYTES)
                with partial.open("wb") as sink:
                    for data in parallel_map(
                        lambda start: file.read_at(min(_DOWNLOAD_BYTES, size - start), start),
                        starts,
                        threads=3,
                    ):
                        sink.write(data)
                os.replace(partial, copy)
            os.utime(copy)
            for other in folder.iterdir():
                if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink(missing_ok=True)
        return copy


def forget_copies(location: str) -> None:
    """Delete the copies on this node of the files of a folder in a bucket."""
    folder = open_folder(location)
    if isinstance(folder, ObjectFolder):
        copies = _node_folder() / digest(folder.location)
        shutil.rmtree(copies, ignore_errors=True)
        Path(f"{copies}.lock").unlink(missing_ok=True)


def _attempt(read: Callable[[str, int, int], bytes], part: Range) -> bytes | OSError:
    try:
        return read(part.name, part.offset, part.length)
    except OSError as error:
        return error
    except ValueError as error:  # The range lies beyond the end of an object.
        return OSError(errno.EINVAL, str(error))


def _node_folder() -> Path:
    """Return this user's own folder for copies on this node. Raises OSError for another's."""
    folder = Path(tempfile.gettempdir()) / f"omni-copies-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "not a folder of this user", str(folder))
    return folder
