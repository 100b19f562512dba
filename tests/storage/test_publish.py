"""An object is replaced as a whole, or stays as it was, wherever its upload breaks off."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from moto.s3.exceptions import InvalidPart
from moto.s3.models import S3Backend

from omni.storage import path as path_module
from omni.storage import publish, s3_client
from omni.storage.flat_folder import ObjectFolder
from omni.storage.path import ObjectPath, as_path
from tests.helpers.loopback_s3 import s3_bucket

SIZE = 21 << 20
OLD = b"old"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("uploads") as uri:
        yield uri


@pytest.fixture
def target(bucket: str) -> ObjectPath:
    """An object in a folder of its own, with an old content."""
    path = as_path(bucket) / uuid.uuid4().hex / "file"
    assert isinstance(path, ObjectPath)
    path.write_bytes(OLD)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "new"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def _write_cache(target: ObjectPath, source: Path) -> None:
    ObjectFolder(target.parent).write(target.name, source.read_bytes())


WRITERS: dict[str, Callable[[ObjectPath, Path], object]] = {
    "upload": lambda target, source: target.upload(source),
    "write_bytes": lambda target, source: target.write_bytes(source.read_bytes()),
    "cache": _write_cache,
}


def _refuse(monkeypatch: pytest.MonkeyPatch, operation: str, after: int = 0) -> None:
    """Let the server refuse requests of one kind, but for the first `after`."""
    real = getattr(S3Backend, operation)
    calls: list[None] = []

    def refuse(self: S3Backend, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) > after:
            raise InvalidPart()
        return real(self, *arguments, **options)

    monkeypatch.setattr(S3Backend, operation, refuse)


def _names(target: ObjectPath) -> list[str]:
    return [path.name for path in target.parent.iterdir()]


@pytest.mark.parametrize(
    ("writer", "operation", "after"),
    [
        ("upload", "upload_part", 1),
        ("upload", "complete_multipart_upload", 0),
        ("upload", "copy_object", 0),
        ("write_bytes", "upload_part", 1),
        ("cache", "upload_part", 1),
    ],
)
def test_a_server_that_refuses_in_the_middle_leaves_the_old_object(
    target: ObjectPath,
    source: Path,
    writer: str,
    operation: str,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _refuse(monkeypatch, operation, after)
    with pytest.raises(OSError):
        WRITERS[writer](target, source)
    assert target.read_bytes() == OLD and _names(target) == ["file"]


@pytest.mark.parametrize(
    ("writer", "error"), [("upload", OSError), ("cache", OSError), ("upload", KeyboardInterrupt)]
)
def test_an_error_of_the_writer_leaves_the_old_object(
    target: ObjectPath,
    source: Path,
    writer: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(source: Any, stream: Any, length: int) -> None:
        stream.write(source.read(length))
        raise error("in the middle")

    monkeypatch.setattr(shutil, "copyfileobj", broken)
    with pytest.raises(error):
        WRITERS[writer](target, source)
    assert target.read_bytes() == OLD and _names(target) == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_large_object_replaces_the_old_one(target: ObjectPath, source: Path, writer: str) -> None:
    WRITERS[writer](target, source)
    assert target.read_bytes() == source.read_bytes() and _names(target) == ["file"]


def test_a_source_that_shrinks_is_not_published(
    target: ObjectPath, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(source: Any, stream: Any, length: int) -> None:
        stream.write(source.read(length))

    monkeypatch.setattr(shutil, "copyfileobj", short)
    with pytest.raises(OSError, match=f"{8 << 20} of {SIZE} bytes"):
        target.upload(source)
    assert target.read_bytes() == OLD and _names(target) == ["file"]


@pytest.mark.parametrize("operation", ["upload_part", "complete_multipart_upload"])
def test_a_small_object_that_is_refused_leaves_the_old_one(
    target: ObjectPath, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (operation, "put_object"):
        _refuse(monkeypatch, name)
    with pytest.raises(OSError):
        target.write_bytes(b"new")
    assert target.read_bytes() == OLD and _names(target) == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_copy_within_the_storage_may_take_its_time(
    target: ObjectPath, source: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = S3Backend.copy_object

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(5)  # pyarrow gives up after three seconds without a byte.
        return copy(*arguments, **named)

    monkeypatch.setattr(S3Backend, "copy_object", slow)
    WRITERS[writer](target, source)
    assert target.read_bytes() == source.read_bytes() and _names(target) == ["file"]


def test_an_object_too_large_to_copy_is_uploaded_by_boto3_and_aborted(
    target: ObjectPath, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_module, "LARGEST_COPY_BYTES", SIZE - 1)
    with monkeypatch.context() as patched:
        _refuse(patched, "upload_part", 1)
        with pytest.raises(OSError):
            target.upload(source)
    assert target.read_bytes() == OLD and _names(target) == ["file"]
    client, name, _ = s3_client.s3_client(target)  # type: ignore[misc]
    begun = client.list_multipart_uploads(Bucket=name).get("Uploads", [])
    assert not [upload for upload in begun if upload["Key"].startswith(target.parent.name)]
    _refuse(monkeypatch, "copy_object")  # It is not needed here.
    target.upload(source)
    assert target.read_bytes() == source.read_bytes()


def test_without_boto3_an_object_too_large_to_copy_is_removed_when_it_fails(
    target: ObjectPath, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_module, "LARGEST_COPY_BYTES", SIZE - 1)
    monkeypatch.setattr(s3_client, "s3_client", lambda path: None)

    def broken(source: Any, stream: Any, length: int) -> None:
        stream.write(source.read(length))
        raise OSError("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", broken)
        with pytest.raises(OSError, match="in the middle"):
            target.upload(source)
    assert _names(target) == []
    target.upload(source)
    assert target.read_bytes() == source.read_bytes()


def test_other_storage_gets_even_small_objects_by_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    target = as_path(f"memory://uploads/{uuid.uuid4().hex}/file")
    assert isinstance(target, ObjectPath)
    target.write_bytes(OLD)

    def broken(source: Any, stream: Any, length: int) -> None:
        stream.write(source.read(1))
        raise OSError("in the middle")

    monkeypatch.setattr(shutil, "copyfileobj", broken)
    with pytest.raises(OSError, match="in the middle"):
        target.write_bytes(b"new")
    assert target.read_bytes() == OLD and _names(target) == ["file"]


def test_what_is_gathered_in_one_request_is_one(
    bucket: str, target: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    real = S3Backend.upload_part

    def count(self: S3Backend, *arguments: Any, **options: Any) -> Any:
        parts.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(S3Backend, "upload_part", count)
    filesystem, key = target.filesystem
    assert isinstance(filesystem, pafs.S3FileSystem)
    data = b"x" * publish.SINGLE_REQUEST_BYTES
    publish.write_object(filesystem, key, data, target.take_name)
    assert len(parts) <= 1 and target.read_bytes() == data
