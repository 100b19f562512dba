"""Rows with hostile addresses, as they are and damaged: nothing is read or fetched for them."""

from __future__ import annotations

import os
import random
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from omni.corpus.sources import Options, open_source, row_audio
from omni.errors import ManifestError
from tests.helpers.hostile_addresses import HOSTILE, resolver

_seen: list[str] = []
_hooked: list[bool] = []


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _seen.append(f"connect {arguments[1]}")
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(("/etc/", "/proc/self/environ", "/dev/zero", "/root/.ssh")):
            _seen.append(f"open {path}")


def addresses(folder: Path, rng: random.Random) -> str:
    """A table whose rows name hostile addresses; half of them are cut and joined at random."""
    rows = []
    for _ in range(8):
        one, other = rng.choice(HOSTILE), rng.choice(HOSTILE)
        if rng.random() < 0.5:
            one = one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other)) :]
        rows.append(one.replace("PORT", "9"))
    path = folder / "corpus" / "x.parquet"
    path.parent.mkdir(exist_ok=True)
    if not _hooked:
        sys.addaudithook(_record)
        _hooked.append(True)
    answers = set()
    for row in rows:
        pq.write_table(pa.table({"audio": [row], "text": ["a"]}), path)
        source = open_source(str(path), Options())
        [part] = source.parts()
        _seen.clear()
        with (
            patch.object(socket, "getaddrinfo", resolver),
            patch.object(row_audio, "_PATIENCE_SECONDS", 0.0),
        ):
            try:
                [found] = source.read(part)
                assert found.data is None, f"{row!r} was fetched"
                inside = Path(os.path.normpath(found.uri)).is_relative_to(path.parent)
                assert found.error is not None or inside, f"{row!r} is {found.uri}"
                answers.add("rejected")
            except ManifestError as error:
                assert "x.parquet:1" in str(error), error
                answers.add("refused")
        assert not _seen, f"{row!r}: {_seen}"
    return "refused" if answers == {"refused"} else "rejected"
