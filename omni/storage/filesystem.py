"""Open the file system that a URI names: pyarrow's, or fsspec's through pyarrow."""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING

from omni.storage.uri import BUCKET_SCHEMES, redact

if TYPE_CHECKING:
    import pyarrow.fs as pafs


class StorageError(OSError):
    """The URI cannot be opened as storage; the message gives the reason without credentials."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EINVAL, message)

    def __str__(self) -> str:
        return str(self.strerror)


REQUESTS_AT_ONCE = 64
"""Small reads of one process that are under way in a bucket."""


@functools.lru_cache(maxsize=64)
def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI and the path in it. Raises StorageError, or OSError."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    scheme, _, rest = uri.partition("://")
    if scheme in BUCKET_SCHEMES and not rest.partition("?")[0].rpartition("@")[2].strip("/"):
        raise StorageError(f"{scheme}://: expected a bucket name after it")
    if scheme == "s3" and pa.io_thread_count() < REQUESTS_AT_ONCE:
        # A client of S3 opens as many connections as there are such threads, and at least 25.
        pa.set_io_thread_count(REQUESTS_AT_ONCE)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    except pa.ArrowInvalid as error:
        if "nrecognized filesystem type" not in str(error):
            raise StorageError(_message(uri, error)) from None
    import fsspec

    try:
        found, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise StorageError(_message(uri, error)) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def _message(uri: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact(f"{uri.partition('?')[0]}: {lines[0]}")
