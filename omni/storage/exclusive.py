"""Create a file that does not exist yet: of all processes that try at once, one succeeds."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from pathlib import Path

from omni.storage.path import ObjectPath, StoragePath
from omni.storage.s3_client import s3_client, s3_errors_as_oserror

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}
_CONFLICTS = 20  # answers "two requests at once, try again" that are accepted
_REFUSED, _CONFLICT = 412, 409  # HTTP status of a condition that does not hold, of a collision


class ConditionsUnsupported(OSError):
    """The storage cannot create an object only where there is none; the message says why."""

    def __str__(self) -> str:
        return str(self.strerror)


def create_exclusively(path: StoragePath, data: bytes) -> bool:
    """Create `path` with `data`; return False, and change nothing, if it exists already.

    data: must differ between callers. What is stored decides, so that an answer that got lost in
    the network is no other caller's success. Raises ConditionsUnsupported, or OSError.
    """
    if isinstance(path, ObjectPath):
        _put_if_absent(path, data)
    else:
        _link(path, data)
    return path.read_bytes() == data


def create_unguarded(path: StoragePath, data: bytes, settle_seconds: float) -> bool:
    """Do as `create_exclusively` where the storage has no means for it, as far as that goes.

    Two callers may both succeed if their writes are more than `settle_seconds` apart and neither
    saw the other's.
    """
    if path.is_file():
        return path.read_bytes() == data
    path.write_bytes(data)
    time.sleep(settle_seconds)
    return path.read_bytes() == data


def _link(path: Path, data: bytes) -> None:
    """Link a whole file to the name: atomic on NFS too, where O_EXCL was not always."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _open_exclusively(path, data)
    finally:
        temporary.unlink(missing_ok=True)


def _open_exclusively(path: Path, data: bytes) -> None:
    """Create the file where the file system has no hard links."""
    with contextlib.suppress(FileExistsError), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_if_absent(path: ObjectPath, data: bytes) -> None:
    found = s3_client(path)
    if found is None:
        why = "needs boto3 (pip install boto3)" if path.scheme == "s3" else "is not supported"
        text = f"creating an object of {path.scheme}:// only where there is none {why}"
        raise ConditionsUnsupported(errno.ENOTSUP, text)
    if _put(found, path, data) and _put(found, path, data):
        # Some servers of this API do not know the condition, and replace the object.
        text = "the server ignores conditions (If-None-Match)"
        raise ConditionsUnsupported(errno.ENOTSUP, text)


def _put(found: tuple[object, str, str], path: ObjectPath, data: bytes) -> bool:
    """Send one conditional request; return whether the server stored the object."""
    from botocore.exceptions import ClientError

    client, bucket, key = found
    for _ in range(_CONFLICTS):
        with s3_errors_as_oserror(path):
            try:
                client.put_object(  # type: ignore[attr-defined]
                    Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"
                )
                return True
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status == _REFUSED:
                    return False
                if error.response.get("Error", {}).get("Code") == "NotImplemented":
                    text = "the server does not know conditions (If-None-Match)"
                    raise ConditionsUnsupported(errno.ENOTSUP, text) from None
                if status != _CONFLICT:
                    raise
        time.sleep(0.05)
    raise OSError(errno.EAGAIN, "too many conflicting requests", str(path))
