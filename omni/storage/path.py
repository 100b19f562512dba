"""Access files on disk and in object storage through the same operations.

`as_path` returns a `pathlib.Path` for a local path, and an `ObjectPath` with pathlib's methods for
a URI: s3://, gs://, abfs://, hdfs:// through pyarrow, other schemes through fsspec where their
package is installed (oss:// with ossfs).
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from omni.errors import ConfigError
from omni.storage.fence import check_fence
from omni.storage.filesystem import StorageError, open_filesystem
from omni.storage.publish import (
    LARGEST_COPY_BYTES,
    SINGLE_REQUEST_BYTES,
    publish,
    write_object,
)
from omni.storage.uri import CREDENTIALS, has_credentials, public_bucket, split_credentials

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs as pafs

_WITH_FOLDERS = {"hdfs"}  # Other stores have no folders, and show an upload once it is complete.
_READ_AHEAD = 1 << 20  # bytes of a request when a file is read in small pieces
_known: dict[tuple[str, str], tuple[str, str]] = {}  # credentials and options by scheme and bucket


def as_path(location: str | Path | ObjectPath) -> StoragePath:
    """Convert a path or URI to a path object, without a request to the storage."""
    if isinstance(location, (ObjectPath, Path)):
        return location
    if location.startswith("file://"):
        return Path(open_filesystem(location)[1])
    return ObjectPath(location) if "://" in location else Path(location)


def literal_path(uri: str) -> StoragePath:
    """Convert a path or plain URI of a table, in which ? and @ are characters of the name.

    Credentials and options are those registered for its bucket.
    """
    scheme, mark, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    plain = f"{scheme}://{public_bucket(scheme, bucket.partition('?')[0])}"
    return ObjectPath(plain) / key if mark else Path(uri)


@dataclass(frozen=True)
class ObjectStat:
    """Size and time of change of an object, named as in `os.stat_result`."""

    st_size: int  # bytes
    st_mtime_ns: int | None


class ObjectPath:
    """Path of an object. Failures are OSError; a missing object is FileNotFoundError.

    Raises ConfigError for a bucket's URI that holds credentials.

    `str()` leaves out credentials and options, for messages and tables; `uri` includes them. Plain
    URIs use the credentials and options last given for their bucket in this process (see
    `register_credentials`).
    """

    def __init__(self, uri: str) -> None:
        if has_credentials(uri):
            scheme = uri.partition(":")[0]
            raise ConfigError(f"{scheme}://***: {CREDENTIALS.format(scheme=scheme)}")
        self._scheme, _, rest = uri.partition("://")
        user, location = split_credentials(self._scheme, rest)
        path, _, options = location.partition("?")
        bucket, _, key = path.partition("/")  # with a port
        # `redact` writes ***: credentials and options that this process has to know, or needs not.
        self._bucket = user.removeprefix("***@").replace(":***@", "@") + bucket
        self._path = PurePosixPath("/") / key
        kept = [option for option in options.split("&") if option and not option.endswith("=***")]
        self._options = "?" * bool(kept) + "&".join(kept)
        name = self._scheme, public_bucket(self._scheme, self._bucket)
        if self._options or name[1] != self._bucket:
            _known[name] = self._bucket, self._options
        else:
            self._bucket, self._options = _known.get(name, (self._bucket, ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.root, self._path)

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
    def scheme(self) -> str:
        return self._scheme

    @property
    def root(self) -> str:
        """URI of the bucket, with credentials and options."""
        return f"{self._scheme}://{self._bucket}{self._options}"

    @property
    def path(self) -> PurePosixPath:
        """Path within the bucket, absolute."""
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

    # -- look ---------------------------------------------------------------------------------

    def info(self) -> pafs.FileInfo:
        """Return pyarrow's description: type, size, mtime."""
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
        """List this folder, sorted by name; a missing folder is empty."""
        import pyarrow.fs as pafs

        filesystem, key = self.filesystem
        selector = pafs.FileSelector(key, allow_not_found=True, recursive=recursive)
        return sorted(filesystem.get_file_info(selector), key=lambda info: str(info.path))

    def iterdir(self) -> Iterator[ObjectPath]:
        return (self / info.base_name for info in self.listing())

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Match names of this folder, not of folders in it."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def files_within(self) -> dict[str, pafs.FileInfo]:
        """Return all files below this folder, by their names relative to it."""
        prefix = len(self.filesystem[1]) + 1
        return {i.path[prefix:]: i for i in self.listing(recursive=True) if i.is_file}

    # -- reading and writing -------------------------------------------------------------------

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open for reading with seek; ranges are fetched on demand."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: expected rb; write an object as a whole")
        return io.BufferedReader(self.ranges(), _READ_AHEAD)

    def ranges(self) -> pa.NativeFile:
        """Open as a pyarrow file, which sends one request per read."""
        filesystem, key = self.filesystem
        return filesystem.open_input_file(key)

    def read_bytes(self) -> bytes:
        filesystem, key = self.filesystem
        with filesystem.open_input_stream(key, compression=None) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Write the object as a whole: an old one is replaced once all bytes are written."""
        filesystem, key = self.filesystem
        if filesystem.type_name in _WITH_FOLDERS:
            self.parent.mkdir()
        check_fence(self)
        write_object(filesystem, key, data, self.take_name)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def upload(self, source: Path) -> None:
        """Copy a local file of any size, as a whole; an old object stays until that is done."""
        size = source.stat().st_size
        if size <= SINGLE_REQUEST_BYTES:
            self.write_bytes(source.read_bytes())
            return
        filesystem, key = self.filesystem
        if filesystem.type_name in _WITH_FOLDERS:
            self.parent.mkdir()
        if filesystem.type_name == "s3" and size > LARGEST_COPY_BYTES:
            from omni.storage.s3_client import upload_large

            upload_large(self, source)
            return
        with source.open("rb") as file:
            publish(
                filesystem, key, file, size, self.take_name, lambda: check_fence(self, fresh=True)
            )

    def take_name(self, old: str) -> None:
        """Move the object of the same bucket, by its path in the file system, to this path."""
        from omni.storage.s3_client import copy_object

        filesystem, key = self.filesystem
        if copy_object(self, old):
            filesystem.delete_file(old)
        else:
            filesystem.move(old, key)

    def touch(self) -> None:
        self.write_bytes(b"")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Create the folder where the storage has folders."""
        filesystem, key = self.filesystem
        if filesystem.type_name in _WITH_FOLDERS:
            filesystem.create_dir(key, recursive=True)

    def unlink(self, missing_ok: bool = False) -> None:
        check_fence(self)
        filesystem, key = self.filesystem
        if missing_ok and not self.exists():  # Some stores raise for a missing object, some do not.
            return
        filesystem.delete_file(key)

    def rmtree(self) -> None:
        check_fence(self, fresh=True)
        filesystem, key = self.filesystem
        if self.exists():
            filesystem.delete_dir(key)

    # -- file system --------------------------------------------------------------------------

    @property
    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """Return the pyarrow file system and the path in it."""
        filesystem, root = open_filesystem(self.root)
        return filesystem, (root.rstrip("/") + str(self._path)).rstrip("/")

    def _at(self, path: PurePosixPath) -> ObjectPath:
        other = ObjectPath.__new__(ObjectPath)  # The constructor would read ? in a name as options.
        other.__dict__ = {**self.__dict__, "_path": path}
        return other


StoragePath: TypeAlias = Path | ObjectPath


def _restored(root: str, path: PurePosixPath) -> ObjectPath:
    return ObjectPath(root) / path


def register_credentials(locations: Iterable[str]) -> None:
    """Read plain names of these URIs' buckets with the same credentials and options."""
    for location in locations:
        if "://" in location:
            as_path(location)


def join(location: str | Path | ObjectPath, name: str) -> str:
    """Append a name to a location, as text, before the options (?region=...) of a URI."""
    inside = as_path(location) / name
    return inside.uri if isinstance(inside, ObjectPath) else str(inside)


def open_ranges(path: StoragePath) -> Any:
    """Open a file for pyarrow, which reads ranges of it without reading ahead. Raises OSError."""
    return path.open("rb") if isinstance(path, Path) else path.ranges()


def remove_tree(folder: StoragePath) -> None:
    """Remove a folder and all in it, ignoring what cannot be removed."""
    if isinstance(folder, Path):
        check_fence(folder, fresh=True)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            folder.rmtree()


def raise_if_unreachable(path: StoragePath, error: Exception) -> None:
    """Raise `error` if the bucket is unavailable rather than the object missing."""
    unreachable = isinstance(error, OSError) and not isinstance(
        error, (FileNotFoundError, StorageError)
    )
    if unreachable and isinstance(path, ObjectPath):
        raise error
