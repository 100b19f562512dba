"""A folder on disk, and one in a bucket on loopback: storage is tested in both."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni.storage.path import StoragePath, as_path
from tests.helpers.loopback_s3 import s3_bucket


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("places") as uri:
        yield uri


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "disk":
        return tmp_path
    return as_path(request.getfixturevalue("bucket")) / uuid.uuid4().hex
