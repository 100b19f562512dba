"""Client of S3's own API, for requests that pyarrow's file system cannot make. Needs boto3."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote

from omni.storage.path import ObjectPath
from omni.storage.uri import redact


def s3_client(path: ObjectPath) -> tuple[Any, str, str] | None:
    """Return (client, bucket, key) of an object; None if it is not in S3, or without boto3."""
    if path.scheme != "s3":
        return None
    filesystem, location = path.filesystem
    bucket, _, key = location.partition("/")
    client = _client(path.root, filesystem.region)
    return None if client is None else (client, bucket, key)


@functools.lru_cache(maxsize=16)
def _client(root: str, region: str) -> Any:
    """Make a client with the credentials, endpoint and options of a bucket's URI."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        return None
    location, _, query = root.partition("://")[2].partition("?")
    options = {name: values[-1] for name, values in parse_qs(query).items()}
    key, _, secret = location.rpartition("@")[0].partition(":")
    endpoint = options.get("endpoint_override")
    if endpoint is not None and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    virtual = options.get("force_virtual_addressing", "false").lower() in ("true", "1")
    style = "path" if endpoint is not None and not virtual else "auto"
    return boto3.client(
        "s3",
        region_name=region or None,
        endpoint_url=endpoint,
        aws_access_key_id=unquote(key) or None,
        aws_secret_access_key=unquote(secret) or None,
        verify=options.get("tls_ca_file_path"),
        config=Config(s3={"addressing_style": style}, retries={"max_attempts": 3}),
    )


@contextmanager
def s3_errors_as_oserror(path: ObjectPath) -> Iterator[None]:
    """Raise OSError for an error of the client."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(errno.EIO, redact(str(error).strip().partition("\n")[0]), str(path)) from None
