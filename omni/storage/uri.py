"""Show URIs and storage failures in messages, without credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET_SCHEMES = {"s3", "gs", "gcs"}  # In other schemes a container or a user may precede the @.


def public_bucket(scheme: str, bucket: str) -> str:
    """Remove credentials from the bucket of a URI; keep a container or user that names it."""
    user, mark, host = bucket.rpartition("@")
    name = "" if scheme in BUCKET_SCHEMES else user.partition(":")[0]
    return f"{name}{mark}{host}" if name else host


def public_uri(spec: str) -> str:
    """Return a path, or a URI (also behind `kind:`) without credentials and options."""
    scheme, mark, rest = spec.partition("://")
    bucket, slash, key = rest.partition("?")[0].partition("/")
    return (
        f"{scheme}{mark}{public_bucket(scheme.rpartition(':')[2], bucket)}{slash}{key}"
        if mark
        else spec
    )


def redact(text: str) -> str:
    """Replace the credentials of every URI in `text` by ***."""
    return re.sub(r"([A-Za-z][\w+.-]*://)[^/@\s'\"]+@", r"\1***@", text)


def reason_of(error: OSError) -> str:
    """Return the reason of a storage failure in a few words."""
    text = error.strerror or str(error).strip().partition("\n")[0] or type(error).__name__
    return redact(text)


@contextmanager
def report_storage_errors(what: str) -> Iterator[None]:
    """Raise RuntimeError, beginning with `what`, for an OSError: storage may answer later.

    The file that failed is named where the error knows it.
    """
    try:
        yield
    except OSError as error:
        file = str(error.filename or "")
        named = f"{redact(file)}: " if file and file not in what else ""
        raise RuntimeError(f"{what}: {named}{reason_of(error)}") from error
