"""Digests are kept in caches, plans and checkpoints: their values may never change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from omni.storage.digest import digest, file_digest


def test_values_are_blake2b_of_the_joined_parts(tmp_path: Path) -> None:
    assert digest("omni") == "45e3d8a7f9d6871c9d0b8102"
    wanted = hashlib.blake2b("ein Größtes".encode(), digest_size=16).hexdigest()
    assert digest("ein ", memoryview("Größtes".encode()), size=16) == wanted
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"a" * (5 << 20))
    second.write_bytes(b"b")
    assert file_digest(first, second) == digest("a" * (5 << 20), b"b")
    assert file_digest(second, first) != file_digest(first, second)
