"""Failures of storage in messages."""

from __future__ import annotations

import errno

import pytest

from omni.storage.uri import report_storage_errors


def test_a_failure_names_what_it_was_for_and_the_file() -> None:
    failure = OSError(errno.EIO, "Input/output error", "/data/a.bin")
    wrong = pytest.raises(RuntimeError, match=r"^data: /data/a\.bin: Input/output error$")
    with wrong as caught, report_storage_errors("data"):
        raise failure
    assert caught.value.__cause__ is failure
    wrong = pytest.raises(RuntimeError, match=r"^--out /data/a\.bin: Input/output error$")
    with wrong, report_storage_errors("--out /data/a.bin"):
        raise failure


def test_a_failure_has_no_credentials_and_other_errors_pass() -> None:
    named = pytest.raises(RuntimeError, match=r"^data: s3://\*{3}@host/a: refused$")
    with named, report_storage_errors("data"):
        raise OSError(errno.ECONNREFUSED, "refused", "s3://key:secret@host/a")
    with pytest.raises(ValueError, match="^wrong$"), report_storage_errors("data"):
        raise ValueError("wrong")
