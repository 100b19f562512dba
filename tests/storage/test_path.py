"""Paths on disk, in a bucket of a real S3 server on loopback, and in a storage of fsspec's."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni.storage import append as growing
from omni.storage.filesystem import StorageError
from omni.storage.path import ObjectPath, StoragePath, as_path, remove_tree
from omni.storage.uri import reason_of
from tests.helpers.loopback_s3 import s3_bucket


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("places") as uri:
        yield uri


@pytest.fixture(params=["disk", "file uri", "bucket", "fsspec"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "disk":
        return as_path(str(tmp_path))
    if request.param == "file uri":
        return as_path(f"file://{tmp_path}")
    if request.param == "fsspec":
        return as_path(f"memory://{uuid.uuid4().hex}") / "a folder"
    return as_path(request.getfixturevalue("bucket")) / tmp_path.name


def test_the_same_operations_do_the_same_everywhere(folder: StoragePath) -> None:
    file = folder / "one" / "step-1.txt"
    assert not file.exists() and not file.is_file() and not file.parent.is_dir()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("first")
    file.write_text("écrit")
    file.with_name("step-2.bin").write_bytes(bytes(range(100)))
    file.with_suffix(".other").touch()
    assert file.exists() and file.is_file() and not file.is_dir() and file.parent.is_dir()
    assert file.read_text(encoding="utf-8") == "écrit"
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == ["step-1.other", "step-1.txt", "step-2.bin"]
    assert [path.name for path in file.parent.glob("*.bin")] == ["step-2.bin"]
    with file.with_name("step-2.bin").open("rb") as opened:
        opened.seek(90)
        assert opened.read(5) == bytes(range(90, 95))
    assert (file.name, file.stem, file.suffix, file.parent.name) == (
        "step-1.txt",
        "step-1",
        ".txt",
        "one",
    )
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.open("rb")
    remove_tree(folder / "one")
    remove_tree(folder / "never")
    assert not (folder / "one").exists() and list((folder / "one").glob("*")) == []


def test_a_large_file_is_uploaded_whole(bucket: str, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(17 << 20))  # several parts of an upload
    there = as_path(bucket) / "large"
    assert isinstance(there, ObjectPath)
    there.upload(source)
    assert there.info().size == 17 << 20
    assert there.read_bytes() == source.read_bytes()


def test_names_keep_what_uris_give_a_meaning(bucket: str) -> None:
    for name in ("with space", "50%", "a+b", "at@sign", "ünï", "packed.gz"):
        path = as_path(bucket) / "names" / name
        path.write_text(name)
        assert path.read_text() == name
        assert path.info().size == len(name.encode())
    assert sorted(path.name for path in (as_path(bucket) / "names").iterdir()) == sorted(
        ("with space", "50%", "a+b", "at@sign", "ünï", "packed.gz")
    )


def test_messages_have_no_credentials_and_pickles_have(bucket: str) -> None:
    path = as_path(bucket) / "runs" / "a@b"
    assert str(path) == "s3://places/runs/a@b"
    assert "endpoint" not in repr(path)
    again = pickle.loads(pickle.dumps(path))
    assert again == path and "endpoint_override" in again.uri
    again.write_text("x")
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nonsense://key:secret@bucket/x", "nonsense"),
        ("s3://", "s3://.*bucket"),
        ("s3://bucket/x?region=r&nonsense=1", "nonsense"),
    ],
)
def test_a_uri_that_names_no_storage_is_refused_at_once(uri: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        as_path(uri).exists()
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_away_is_an_oserror_in_few_words() -> None:
    path = as_path("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=r")
    with pytest.raises(OSError) as caught:
        path.read_bytes()
    said = reason_of(caught.value)
    assert said and "secret" not in said and "\n" not in said


def test_a_growing_file_is_read_back_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "SEGMENT_BYTES", 1000)
    path = as_path(bucket) / "grows" / "metrics.jsonl"
    assert isinstance(path, ObjectPath)
    assert list(growing.read(path)) == []
    lines = [f"line {number} {'x' * 50}\n".encode() for number in range(100)]
    for number, line in enumerate(lines):
        if number == 50:
            growing._last.clear()  # another process goes on with it
        growing.append(path, line)
    assert list(growing.read(path)) == lines
    sizes = [segment.info().size for segment in growing.segments(path)]
    assert len(sizes) > 4 and max(sizes) < 1100

    growing.replace(path, b"".join(lines[:40]))
    growing.append(path, lines[40])
    assert list(growing.read(path)) == lines[:41]
    growing.remove(path)
    assert list(growing.read(path)) == [] and not path.exists()


def test_two_processes_that_take_turns_lose_nothing(bucket: str) -> None:
    path = as_path(bucket) / "turns" / "metrics.jsonl"
    assert isinstance(path, ObjectPath)
    kept: list[dict[ObjectPath, growing._Last]] = [{}, {}]
    for number in range(10):
        growing._last.clear()
        growing._last.update(kept[number % 2])
        growing.append(path, f"{number}\n".encode())
        kept[number % 2] = dict(growing._last)
    assert list(growing.read(path)) == [f"{number}\n".encode() for number in range(10)]


def test_an_append_whose_answer_is_lost_is_made_once(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_path(bucket) / "answers" / "ledger.jsonl"
    assert isinstance(path, ObjectPath)
    growing.append(path, b"1\n")
    write = ObjectPath.write_bytes

    def lose_the_answer(self: ObjectPath, data: bytes) -> int:
        write(self, data)
        raise OSError("connection reset")

    def refuse(self: ObjectPath, data: bytes) -> int:
        raise OSError("no connection")

    for failure, line in ((lose_the_answer, b"2\n"), (refuse, b"3\n")):
        with monkeypatch.context() as patched, pytest.raises(OSError):
            patched.setattr(ObjectPath, "write_bytes", failure)
            growing.append(path, line)
        growing.append(path, line)
    growing.append(path, b"3\n")
    assert list(growing.read(path)) == [b"1\n", b"2\n", b"3\n", b"3\n"]
