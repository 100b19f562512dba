"""Digests that identify content: fingerprints, cache keys and checksums of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK = 1 << 22  # bytes


def digest(*parts: str | bytes | memoryview, size: int = 12) -> str:
    """Hash the parts, joined, with BLAKE2b: 2 * `size` hexadecimal digits. Text is UTF-8."""
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
    return state.hexdigest()


def file_digest(*paths: Path, size: int = 12) -> str:
    """Hash the content of the files, joined, as `digest` does, in little memory."""
    state = hashlib.blake2b(digest_size=size)
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    return state.hexdigest()
