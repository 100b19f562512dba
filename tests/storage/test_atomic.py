"""Files appear whole or not at all, on disk and in a bucket."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from omni.storage.atomic import open_atomic, write_atomic
from omni.storage.path import StoragePath, as_path


def test_a_file_is_replaced_when_all_is_written(folder: StoragePath) -> None:
    path = folder / "table.parquet"
    write_atomic(path, b"old")
    with open_atomic(path) as file:
        file.write(b"new" * 1000)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" * 1000 and path.stat().st_size == 3000
    assert [child.name for child in folder.iterdir()] == [path.name]


def test_a_failure_leaves_the_old_file_and_nothing_else(folder: StoragePath) -> None:
    path = folder / "index.json"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [child.name for child in folder.iterdir()] == [path.name]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "parts" / "one"
    path.parent.mkdir()
    path.write_bytes(b"old")
    code = f"""
import os, pathlib
from omni.storage.atomic import open_atomic
with open_atomic(pathlib.Path({str(path)!r})) as file:
    file.write(b"half" * 100_000)
    file.flush()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert path.read_bytes() == b"old"
    [left] = [child for child in path.parent.iterdir() if child != path]
    assert left in set(tmp_path.glob("*/*.tmp")), "jobs.index clears these away"


def test_a_missing_object_has_no_size(bucket: str) -> None:
    path = as_path(bucket) / uuid.uuid4().hex
    with pytest.raises(FileNotFoundError):
        path.stat()
    path.write_bytes(b"")
    assert path.stat().st_size == 0 and path.stat().st_mtime_ns
