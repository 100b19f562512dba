"""Files on disk or in object storage, by the same few operations.

`as_path` gives a `pathlib.Path` for what a node's file system has, and an `ObjectPath`, which
follows pathlib's names, for a URI: s3://, gs://, abfs://, hdfs:// through pyarrow, other schemes
through fsspec where the package for them is installed (oss:// with ossfs).
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import io
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs as pafs

_WITH_FOLDERS = {"hdfs"}  # anywhere else an upload appears when it is complete, and names are flat
_BUCKETS = {"s3", "gs", "gcs"}  # elsewhere a container or a user may stand before the @
_READ_AHEAD = 1 << 20  # bytes of a request, for whoever reads little by little
_known: dict[tuple[str, str], tuple[str, str]] = {}  # credentials and options by scheme and bucket


class StorageError(OSError):
    """A URI names no storage that can be opened; the message says why, without credentials."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EINVAL, message)

    def __str__(self) -> str:
        return str(self.strerror)


def as_path(location: str | Path | ObjectPath) -> StoragePath:
    """Where a path or URI points; asks nothing of the storage."""
    if isinstance(location, (ObjectPath, Path)):
        return location
    if location.startswith("file://"):
        return Path(_open(location)[1])
    return ObjectPath(location) if "://" in location else Path(location)


def literal_path(uri: str) -> StoragePath:
    """What a table names by a path or a plain URI: all of that is the name. Credentials and options
    are those that are known of its bucket.
    """
    scheme, mark, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    plain = f"{scheme}://{public_bucket(scheme, bucket.partition('?')[0])}"
    return ObjectPath(plain) / key if mark else Path(uri)


@dataclass(frozen=True)
class ObjectStat:
    """The fields of `os.stat_result` that object storage knows."""

    st_size: int  # bytes
    st_mtime_ns: int | None


class ObjectPath:
    """One name in object storage. Failures are OSError; a missing object is FileNotFoundError.

    `str()` of it is for messages and tables, without credentials and options; `uri` has them. Where
    a bucket was named with them once, its plain names mean the same in this process (see
    `register_credentials`).
    """

    def __init__(self, uri: str) -> None:
        self._scheme, _, rest = uri.partition("://")
        path, question, options = rest.partition("?")
        bucket, _, key = path.partition("/")  # with credentials, or host and port
        self._bucket = bucket.removeprefix("***@")  # as `redact` leaves it
        self._path = PurePosixPath("/") / key
        self._options = question + options
        name = self._scheme, public_bucket(self._scheme, self._bucket)
        if self._options or name[1] != self._bucket:
            _known[name] = self._bucket, self._options
        else:
            self._bucket, self._options = _known.get(name, (self._bucket, ""))

    def __reduce__(self) -> tuple[Any, ...]:
        root = f"{self._scheme}://{self._bucket}{self._options}"
        return _restored, (root, self._path)

    def __str__(self) -> str:
        return f"{self._scheme}://{public_bucket(self._scheme, self._bucket)}{self._path}".rstrip(
            "/"
        )

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __lt__(self, other: ObjectPath) -> bool:
        return self.uri < other.uri

    def __truediv__(self, name: str | PurePosixPath) -> ObjectPath:
        return self._at(self._path / str(name).lstrip("/"))

    @property
    def uri(self) -> str:
        return f"{self._scheme}://{self._bucket}{self._path}".rstrip("/") + self._options

    @property
    def path(self) -> PurePosixPath:
        """Within the bucket, from its root."""
        return self._path

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return self._path.parts

    @property
    def parent(self) -> ObjectPath:
        return self._at(self._path.parent)

    def with_name(self, name: str) -> ObjectPath:
        return self._at(self._path.with_name(name))

    def with_suffix(self, suffix: str) -> ObjectPath:
        return self._at(self._path.with_suffix(suffix))

    def is_absolute(self) -> bool:
        return True

    def expanduser(self) -> ObjectPath:
        return self

    def absolute(self) -> ObjectPath:
        return self

    def resolve(self) -> ObjectPath:
        return self

    # -- what is there -------------------------------------------------------------------------

    def info(self) -> pafs.FileInfo:
        """As pyarrow describes it: type, size, mtime."""
        filesystem, key = self.filesystem
        return filesystem.get_file_info(key)

    def stat(self) -> ObjectStat:
        """Return the object's size and time of change. Raises FileNotFoundError."""
        info = self.info()
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return ObjectStat(info.size or 0, info.mtime_ns)

    def exists(self) -> bool:
        return bool(self.info().type.value)

    def is_file(self) -> bool:
        return bool(self.info().is_file)

    def is_dir(self) -> bool:
        return bool(self.info().type.name == "Directory")

    def listing(self, recursive: bool = False) -> list[pafs.FileInfo]:
        """What lies in this folder, by name; nothing where there is none."""
        import pyarrow.fs as pafs

        filesystem, key = self.filesystem
        selector = pafs.FileSelector(key, allow_not_found=True, recursive=recursive)
        return sorted(filesystem.get_file_info(selector), key=lambda info: str(info.path))

    def iterdir(self) -> Iterator[ObjectPath]:
        return (self / info.base_name for info in self.listing())

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Of this folder alone."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def files_within(self) -> dict[str, pafs.FileInfo]:
        """All files of this folder, at any depth, by their names relative to it."""
        prefix = len(self.filesystem[1]) + 1
        return {i.path[prefix:]: i for i in self.listing(recursive=True) if i.is_file}

    # -- reading and writing -------------------------------------------------------------------

    def open(self, mode: str = "rb") -> IO[bytes]:
        """For reading from any place in it; ranges are fetched as they are asked for."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: objects are opened for reading, and written whole")
        return io.BufferedReader(self.ranges(), _READ_AHEAD)

    def ranges(self) -> pa.NativeFile:
        """As pyarrow reads it: a request for each read."""
        filesystem, key = self.filesystem
        return filesystem.open_input_file(key)

    def read_bytes(self) -> bytes:
        filesystem, key = self.filesystem
        with filesystem.open_input_stream(key, compression=None) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Whole or not at all: what is there before is replaced when all has been written."""
        with self._written() as stream:
            stream.write(data)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def upload(self, source: Path) -> None:
        """A file of any size, whole or not at all."""
        with source.open("rb") as file, self._written() as stream:
            shutil.copyfileobj(file, stream, 8 << 20)

    def touch(self) -> None:
        self.write_bytes(b"")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Object stores have no folders; where the storage has, this makes one."""
        filesystem, key = self.filesystem
        if filesystem.type_name in _WITH_FOLDERS:
            filesystem.create_dir(key, recursive=True)

    def unlink(self, missing_ok: bool = False) -> None:
        filesystem, key = self.filesystem
        if missing_ok and not self.exists():  # some stores mind, some do not
            return
        filesystem.delete_file(key)

    def rmtree(self) -> None:
        filesystem, key = self.filesystem
        if self.exists():
            filesystem.delete_dir(key)

    # -- within --------------------------------------------------------------------------------

    @property
    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """For libraries that take pyarrow's: the file system, and the path in it."""
        filesystem, root = _open(f"{self._scheme}://{self._bucket}{self._options}")
        return filesystem, (root.rstrip("/") + str(self._path)).rstrip("/")

    def _at(self, path: PurePosixPath) -> ObjectPath:
        other = ObjectPath.__new__(ObjectPath)  # a ? in a name begins no options
        other.__dict__ = {**self.__dict__, "_path": path}
        return other

    @contextlib.contextmanager
    def _written(self) -> Iterator[Any]:
        filesystem, key = self.filesystem
        if filesystem.type_name not in _WITH_FOLDERS:
            with filesystem.open_output_stream(key, compression=None) as stream:
                yield stream
            return
        self.parent.mkdir()
        temporary = f"{key}.{uuid.uuid4().hex}.tmp"
        with filesystem.open_output_stream(temporary, compression=None) as stream:
            yield stream
        filesystem.move(temporary, key)


StoragePath: TypeAlias = Path | ObjectPath


def public_bucket(scheme: str, bucket: str) -> str:
    """A URI's bucket without credentials; what else may stand before an @ is part of the name."""
    user, mark, host = bucket.rpartition("@")
    name = "" if scheme in _BUCKETS else user.partition(":")[0]
    return f"{name}{mark}{host}" if name else host


def public_uri(spec: str) -> str:
    """A path, or a URI without credentials and options, maybe behind a `kind:`; for messages."""
    scheme, mark, rest = spec.partition("://")
    bucket, slash, key = rest.partition("?")[0].partition("/")
    return (
        f"{scheme}{mark}{public_bucket(scheme.rpartition(':')[2], bucket)}{slash}{key}"
        if mark
        else spec
    )


def _restored(root: str, path: PurePosixPath) -> ObjectPath:
    return ObjectPath(root) / path


def register_credentials(locations: Iterable[str]) -> None:
    """Read plain names of these URIs' buckets with the same credentials and options."""
    for location in locations:
        if "://" in location:
            as_path(location)


def join(location: str | Path, name: str) -> str:
    """A name inside a location, as text; a URI's options (?region=...) stay at its end."""
    inside = as_path(location) / name
    return inside.uri if isinstance(inside, ObjectPath) else str(inside)


def redact(text: str) -> str:
    """URIs in `text` without the credentials that may stand before their host."""
    return re.sub(r"([A-Za-z][\w+.-]*://)[^/@\s'\"]+@", r"\1***@", text)


def open_ranges(path: StoragePath) -> Any:
    """Open a file for pyarrow, which reads ranges of it without reading ahead. Raises OSError."""
    return path.open("rb") if isinstance(path, Path) else path.ranges()


def remove_tree(folder: StoragePath) -> None:
    """A folder and all in it; what cannot be removed stays."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            folder.rmtree()


def raise_if_unreachable(path: StoragePath, error: Exception) -> None:
    """A bucket that does not answer says nothing about what is in it: raises the error then."""
    gone = isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, StorageError))
    if gone and isinstance(path, ObjectPath):
        raise error


def reason_of(error: OSError) -> str:
    """Why storage failed, in a few words."""
    text = error.strerror or str(error).strip().partition("\n")[0] or type(error).__name__
    return redact(text)


@functools.lru_cache(maxsize=64)
def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the URI's path in it. Raises StorageError, or OSError."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    scheme, _, rest = uri.partition("://")
    if scheme in _BUCKETS and not rest.partition("?")[0].rpartition("@")[2].strip("/"):
        raise StorageError(f"{scheme}://: expected the name of a bucket behind it")
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    except pa.ArrowInvalid as error:
        if "nrecognized filesystem type" not in str(error):
            raise StorageError(_said(uri, error)) from None
    import fsspec

    try:
        found, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise StorageError(_said(uri, error)) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def _said(uri: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact(f"{uri.partition('?')[0]}: {lines[0]}")
