"""Write files that appear under their name whole, or not at all."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from omni.storage.fence import check_fence
from omni.storage.path import ObjectPath, StoragePath
from omni.storage.retry import retry_storage


@contextmanager
def open_atomic(path: StoragePath) -> Iterator[IO[bytes]]:
    """Open a file of any size for writing; it takes its name when the block ends without an error.

    On disk it is written beside `path`, in a folder that must exist, as a hidden `.tmp` file, and
    reaches the disk before it is renamed. An object is gathered in a temporary file and uploaded,
    again and again while storage is unavailable.
    """
    if isinstance(path, ObjectPath):
        with tempfile.NamedTemporaryFile(prefix="omni-upload-") as made:
            yield made
            made.flush()
            retry_storage(lambda: path.upload(Path(made.name)))
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_fence(path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: StoragePath, data: bytes) -> None:
    """Write a whole file or none of it. Raises OSError at once when storage fails."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    with open_atomic(path) as file:
        file.write(data)
