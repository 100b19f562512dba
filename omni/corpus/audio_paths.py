"""Resolve and validate the audio paths of a manifest."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from omni.storage.path import ObjectPath, StoragePath
from omni.storage.uri import public_bucket, public_uri, redact, split_credentials

_STORES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "oss")
_SHOWN = 200  # characters of an address in a message


class AddressError(ValueError):
    """A row's address is of a kind that omni does not open, whatever the settings."""


def recording_uri(folder: StoragePath, name: str, allow_absolute: bool) -> str:
    """Resolve the recording `name` of a manifest in `folder` to a path or the URI of an object.

    Raises AddressError for another scheme than those of files and stores and for a name that no
    file can have, and ValueError where it may not lie there: outside the folder unless
    `allow_absolute`, on this machine while the manifest is in a bucket, or with credentials and
    options of its own, which would hold for everything else in that bucket.
    """
    if "\0" in name:
        raise AddressError(f"{shown(name)}: no file has NUL in its name")
    scheme, mark, rest = name.partition("://")
    if mark and scheme != "file":
        uri = _object(folder, scheme, rest, name)
        within = uri.startswith(f"{folder}/")
    elif isinstance(folder, ObjectPath):
        if mark or os.path.isabs(name):
            raise ValueError(
                f"{name!r} lies outside the manifest's folder, and on this machine: a manifest in "
                "a bucket names objects"
            )
        root = str(folder).removesuffix(str(folder.path))
        uri = root + posixpath.normpath(folder.path / name)
        within = uri.startswith(f"{folder}/")
    else:
        path = rest if mark else name
        uri, normal = str(folder / path), os.path.normpath(path)
        # Compare names, not link targets: a link in the folder was put there by its owner.
        within = normal.split(os.sep)[0] != os.pardir
        if os.path.isabs(path):
            uri = os.path.normpath(path) if mark else str(Path(path))
            within = Path(normal).is_relative_to(folder)
    if not (within or allow_absolute):
        raise ValueError(
            f"{public_uri(name)!r} lies outside the manifest's folder {folder}; "
            "data.allow_absolute or --allow_absolute admits such files"
        )
    return uri


def shown(address: str) -> str:
    """Quote an address of a row for a message, without credentials."""
    return repr(redact(address[:_SHOWN]))


def _object(folder: StoragePath, scheme: str, rest: str, name: str) -> str:
    own = str(folder).partition("://")[0] if isinstance(folder, ObjectPath) else None
    if scheme not in (*_STORES, own):
        raise AddressError(
            f"{shown(name)}: rows do not open {shown(scheme)}: expected a path, or a URI of "
            f"{', '.join(_STORES)}"
        )
    user, location = split_credentials(scheme, rest)
    bucket, _, key = location.partition("/")
    bucket = user + bucket
    if "::" in bucket:  # fsspec would open what follows.
        raise AddressError(f"{shown(name)}: expected the name of a bucket without ::")
    if "?" in rest or public_bucket(scheme, bucket) != bucket:
        raise ValueError(
            f"{scheme}://{public_bucket(scheme, bucket)}/{key.partition('?')[0]}: its credentials "
            "and options belong into the environment, or the URI of the manifest"
        )
    return f"{scheme}://{bucket}{posixpath.normpath(f'/{key}')}"
