"""Client of S3's own API, for requests that pyarrow's file system cannot make. Needs boto3."""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from omni.storage.fence import check_fence
from omni.storage.path import ObjectPath
from omni.storage.uri import redact


def s3_client(path: ObjectPath) -> tuple[Any, str, str] | None:
    """Return (client, bucket, key) of an object; None if it is not in S3, or without boto3."""
    if path.scheme != "s3":
        return None
    filesystem, location = path.filesystem
    bucket, _, key = location.partition("/")
    with _LOCK:  # boto3's session is not made for several threads.
        client = _client(path.root, filesystem.region)
    return None if client is None else (client, bucket, key)


_CONNECTIONS = 64
"""Most connections of one client: requests of loaders run at the same time."""
_CONNECT_SECONDS = 10
_LOCK = threading.Lock()


@functools.lru_cache(maxsize=16)
def _client(root: str, region: str) -> Any:
    """Make a client with the endpoint and options of a bucket's URI.

    Credentials are those of the environment, as for pyarrow; `anonymous@` asks for none.
    """
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        return None
    location, _, query = root.partition("://")[2].partition("?")
    options = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint = options.get("endpoint_override")
    if endpoint is not None and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    virtual = options.get("force_virtual_addressing", "false").lower() in ("true", "1")
    style = "path" if endpoint is not None and not virtual else "auto"
    return boto3.client(
        "s3",
        region_name=region or None,
        endpoint_url=endpoint,
        verify=options.get("tls_ca_file_path"),
        config=Config(
            s3={"addressing_style": style},
            retries={"max_attempts": 3},
            max_pool_connections=_CONNECTIONS,
            connect_timeout=_CONNECT_SECONDS,
            signature_version=UNSIGNED if location.startswith("anonymous@") else None,
        ),
    )


@contextmanager
def s3_errors_as_oserror(path: ObjectPath) -> Iterator[None]:
    """Raise OSError for an error of the client."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(errno.EIO, redact(str(error).strip().partition("\n")[0]), str(path)) from None


def read_start(path: ObjectPath, most: int) -> bytes | None:
    """Read an object of up to `most` bytes; None for a larger one.

    One request with boto3, and two without: pyarrow asks for the size first. Raises OSError.
    """
    with s3_errors_as_oserror(path):
        found = s3_client(path)
    if found is None:
        with path.ranges() as file:
            return None if file.size() > most else bytes(file.read())
    from botocore.exceptions import ClientError

    client, bucket, key = found
    with s3_errors_as_oserror(path):
        try:
            answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{most}")
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            if code == "InvalidRange":
                return b""  # An empty object has no first byte.
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
            raise
        with contextlib.closing(answer["Body"]) as body:
            return bytes(body.read()) if answer["ContentLength"] <= most else None


def copy_object(path: ObjectPath, source: str) -> bool:
    """Copy an object of the same bucket, by its path in pyarrow's file system; False without boto3.

    pyarrow gives up when three seconds pass without a byte, as they may for a copy of a gigabyte.
    """
    found = s3_client(path)
    if found is None:
        return False
    client, bucket, key = found
    with s3_errors_as_oserror(path):
        origin = {"Bucket": bucket, "Key": source.partition("/")[2]}
        client.copy_object(Bucket=bucket, Key=key, CopySource=origin)
    return True


def upload_large(path: ObjectPath, source: Path) -> None:
    """Upload a file that is too large to be copied within S3, and abort if that fails.

    Without boto3 nothing can abort pyarrow's upload: the object is then removed if it fails.
    """
    found = s3_client(path)
    if found is not None:
        from boto3.exceptions import Boto3Error

        client, bucket, key = found
        check_fence(path, fresh=True)
        with s3_errors_as_oserror(path):
            try:
                client.upload_file(str(source), bucket, key)
            except Boto3Error as error:
                raise OSError(errno.EIO, redact(str(error)), str(path)) from None
        return
    filesystem, location = path.filesystem
    check_fence(path, fresh=True)
    try:
        with source.open("rb") as file, filesystem.open_output_stream(location) as stream:
            shutil.copyfileobj(file, stream, 8 << 20)
        if path.stat().st_size != source.stat().st_size:
            raise OSError(errno.EIO, "a part of the file did not arrive", str(path))
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
