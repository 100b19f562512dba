"""Write an object whole or not at all.

Closing pyarrow's output stream publishes what was written so far, also when an error closes it, and
there is no way to abort it. A large object is therefore written under a temporary name, and takes
its own by a move within the storage once all of it has arrived.
"""

from __future__ import annotations

import contextlib
import errno
import io
import shutil
import uuid
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.fs as pafs

SINGLE_REQUEST_BYTES = 4 << 20
"""Bytes that pyarrow gathers in memory and sends to S3 in one request, when the stream closes."""
LARGEST_COPY_BYTES = 5 << 30
"""Largest object that S3 copies in one request."""
_CHUNK_BYTES = 8 << 20
TEMPORARY_SUFFIX = ".tmp"


def write_object(
    filesystem: pafs.FileSystem, key: str, data: bytes, take_name: Callable[[str], None]
) -> None:
    """Write `data` as the object `key`; an old one stays until all bytes are there.

    take_name: as for `publish`.
    """
    if filesystem.type_name == "s3" and len(data) <= SINGLE_REQUEST_BYTES:
        with filesystem.open_output_stream(key, compression=None) as stream:
            stream.write(data)
        return
    publish(filesystem, key, io.BytesIO(data), len(data), take_name)


def publish(
    filesystem: pafs.FileSystem,
    key: str,
    source: IO[bytes],
    size: int,
    take_name: Callable[[str], None],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write the `size` bytes of `source` as the object `key`, under a temporary name first.

    take_name: moves the object of the temporary name to `key`. before: called ahead of that, when
    all is written.
    """
    folder, _, name = key.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    try:
        with filesystem.open_output_stream(temporary, compression=None) as stream:
            shutil.copyfileobj(source, stream, _CHUNK_BYTES)
        written = filesystem.get_file_info(temporary).size
        if written != size:
            raise OSError(errno.EIO, f"{written} of {size} bytes arrived", key)
        before()
        take_name(temporary)
    except BaseException:
        with contextlib.suppress(Exception):
            if filesystem.get_file_info(temporary).type.value:
                filesystem.delete_file(temporary)
        raise
