"""Show URIs and storage failures in messages, without credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUCKET_SCHEMES = {"s3", "gs", "gcs"}
CREDENTIALS = (
    "credentials do not belong into a URI of {scheme}: set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS, or use the role of "
    "the machine"
)
"""Text of the error for a URI that `has_credentials`."""
_NAMELESS = {*BUCKET_SCHEMES, "http", "https", "hf"}
"""Before the @ of other schemes a container or a user may stand, which names the place."""
_URI = re.compile(r"([A-Za-z][\w+.-]*)://([^\s'\"<>`\\]+)")
_PARAMETER = re.compile(
    r"([?&;][\w.-]*?(?:sig|signature|token|secret|password|passwd|pwd|credential|key|keyid)=)"
    r"([^\s&;#'\"<>`\\]+)",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(hf_|gh[opsu]_|github_pat_)\w{16,}|((?i:bearer) )[\w.~+/=-]{8,}")


def split_credentials(scheme: str, rest: str) -> tuple[str, str]:
    """Split what follows :// into credentials (with their @) and the rest.

    A secret may hold slashes, of AWS about every second one does, and a password an @: behind a
    colon that no port follows, credentials reach up to the last @.
    """
    first = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, mark, _ = first.rpartition("@")
    _, colon, port = (user if mark else first).partition(":")
    host = not mark and (first.startswith("[") or re.fullmatch(r"\d{0,5}", port))
    if colon and (scheme.lower() in BUCKET_SCHEMES or not host):
        end = rest.rfind("@") + 1
    else:
        end = len(user + mark)
    return rest[:end], rest[end:]


def _name(scheme: str, user: str) -> str:
    """Return the container or user that credentials begin with, where it is not one of them."""
    return "" if scheme.lower() in _NAMELESS else user.rstrip("@").partition(":")[0]


def has_credentials(uri: str) -> bool:
    """Check a URI of a bucket for credentials; those that `redact` wrote as *** are none."""
    scheme, mark, rest = uri.partition("://")
    if not mark or scheme.rpartition(":")[2].lower() not in BUCKET_SCHEMES:
        return False
    rest = rest.removeprefix("***@").removeprefix("anonymous@")  # pyarrow's way to have none
    bucket = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return bool(set("@:") & set(bucket)) or any(p[2] != "***" for p in _PARAMETER.finditer(rest))


def public_bucket(scheme: str, bucket: str) -> str:
    """Remove credentials from the bucket of a URI; keep a container or user that names it."""
    user, host = split_credentials(scheme, bucket)
    name = _name(scheme, user)
    return f"{name}@{host}" if name else host


def public_uri(spec: str) -> str:
    """Return a path, or a URI (also behind `kind:`) without credentials and options."""
    kind, mark, rest = spec.partition("://")
    if not mark:
        return spec
    scheme = kind.rpartition(":")[2]
    user, location = split_credentials(scheme, rest)
    name = _name(scheme, user)
    return f"{kind}{mark}{name}{'@' * bool(name)}{location.partition('?')[0]}"


def redact(text: str) -> str:
    """Replace credentials by ***: of every URI in `text`, in its parameters, and hubs' tokens."""
    if "://" in text:
        text = _URI.sub(_without_user, text)
    return _TOKEN.sub(r"\1\2***", _PARAMETER.sub(r"\1***", text))


def _without_user(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    user, location = split_credentials(scheme, rest)
    name = _name(scheme, user)
    if not user or name and ":" not in user:
        return found[0]
    return f"{scheme}://{name}{':' * bool(name)}***@{location}"


def redacted(value: Any) -> Any:
    """Return plain values, such as of YAML or JSON, without credentials in their texts."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return value


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
