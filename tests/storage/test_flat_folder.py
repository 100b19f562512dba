"""A folder of immutable files: on disk, and in a bucket of a real S3 server on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni.storage.flat_folder import Folder, open_folder
from omni.storage.path import join
from omni.stream.feature_cache import FeatureCache
from tests.helpers.loopback_s3 import s3_bucket


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("features") as uri:
        yield join(uri, "omni")


@pytest.fixture(params=["disk", "file uri", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "a folder")
    if request.param == "file uri":
        return f"file://{tmp_path}/folder"
    return join(request.getfixturevalue("bucket"), tmp_path.name)


def test_what_is_written_can_be_listed_and_read_in_part(location: str) -> None:
    writer, reader = open_folder(location), open_folder(location)
    assert reader.list() == {}
    writer.write("a.bin", bytes(range(100)))
    writer.write("b.bin", b"")
    writer.write("b.bin", b"again")
    assert reader.list() == {"a.bin": 100, "b.bin": 5}
    assert reader.read("a.bin") == bytes(range(100))
    assert reader.read("a.bin", 10, 5) == bytes(range(10, 15))
    assert reader.read("a.bin", 98, 5) == bytes([98, 99])
    assert reader.read("b.bin") == b"again"


def test_what_is_absent_is_an_oserror(location: str) -> None:
    folder: Folder = open_folder(location)
    with pytest.raises(OSError):
        folder.read("nothing", 0, 1)
    with pytest.raises(OSError):
        folder.read("nothing")


def test_a_cache_lies_anywhere(location: str) -> None:
    items = {f"key-{n}": os.urandom(1000 + n) for n in range(20)}
    for half in (0, 1):
        cache = FeatureCache(location)
        cache.put({key: data for n, (key, data) in enumerate(items.items()) if n % 2 == half})
        cache.flush()
    reader = FeatureCache(location)
    assert len(reader) == 20
    assert reader.get(items) == items
    assert reader.stored_bytes == sum(len(data) for data in items.values())


def test_messages_name_the_place_and_no_credentials(bucket: str) -> None:
    cache = FeatureCache(bucket, limit_bytes=1)
    cache.put({"key": b"features"})
    cache.flush()
    assert cache.location == "s3://features/omni"
    assert cache.full is not None and "secret" not in cache.full and "features/omni" in cache.full


def test_a_reader_finds_what_comes_later(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.storage.flat_folder._LIST_SECONDS", 0.0)
    reader, writer = FeatureCache(location), FeatureCache(location)
    assert reader.get(["key"]) == {}
    writer.put({"key": b"features"})
    writer.flush()
    assert reader.get(["key"]) == {"key": b"features"}


@pytest.mark.parametrize(
    "location, joined",
    [
        ("/runs/cache", "/runs/cache/x"),
        ("/odd?name/", "/odd?name/x"),
        ("s3://bucket", "s3://bucket/x"),
        ("s3://", "s3:///x"),  # which no one takes for a path
        ("s3://bucket/a/?region=eu-west-1", "s3://bucket/a/x?region=eu-west-1"),
    ],
)
def test_a_name_is_joined_before_the_options_of_a_uri(
    location: str, joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni.storage.path._known", {})
    assert join(location, "x") == joined
