"""Rows with hostile addresses, as they are and damaged: nothing is read or fetched for them."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from omni.corpus.index import build_index
from omni.corpus.sources import Options, open_source, row_audio
from omni.errors import ManifestError
from tests.helpers.hostile_addresses import HOSTILE, naming, resolver
from tests.helpers.trap import Trap

ROWS = 8
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
    """Tables whose rows name hostile addresses, a server and a private file of this machine.

    Half of the addresses are cut and joined at random. Rows are read one by one, and those that are
    left out by themselves once more as one corpus.
    """
    home = folder / "corpus"
    home.mkdir(exist_ok=True)
    secret = folder / "private.wav"
    secret.write_bytes(b"RIFF")
    if not _hooked:
        sys.addaudithook(_record)
        _hooked.append(True)
    with (
        Trap(secret) as trap,
        patch.object(socket, "getaddrinfo", resolver),
        patch.object(row_audio, "_PATIENCE_SECONDS", 0.0),
    ):
        known = [*HOSTILE, *naming(secret, home)]
        rows = [_address(known, rng).replace("PORT", str(trap.port)) for _ in range(ROWS)]
        write = rng.choice([_parquet, _structs, _manifest, _table])
        taken = [row for row in rows if _is_taken(row, write, home, trap)]
        _as_one_corpus(taken, write, home, trap)
    return "rejected" if taken else "refused"


def _address(known: list[str], rng: random.Random) -> str:
    one, other = rng.choice(known), rng.choice(known)
    if rng.random() < 0.5:
        return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other)) :]
    return one


def _is_taken(row: str, write: _Write, home: Path, trap: Trap) -> bool:
    """Read the only row of a corpus; tell whether the others of a corpus would be read too."""
    spec = write(home, [row])
    source = open_source(spec, Options())
    [part] = source.parts()
    _seen.clear()
    try:
        [found] = source.read(part)
        assert found.data is None, f"{row!r} was fetched"
        inside = Path(os.path.normpath(found.uri)).is_relative_to(home)
        assert found.error is not None or inside, f"{row!r} is {found.uri}"
    except ManifestError as error:
        assert f"{Path(spec).name}:" in str(error), error
        return False
    finally:
        _nothing_happened(repr(row), trap)
    return True


def _as_one_corpus(rows: list[str], write: _Write, home: Path, trap: Trap) -> None:
    """Index the rows beside each other: they are named and left out, and nothing is measured."""
    _seen.clear()
    try:
        build_index([write(home, rows)])
    except ManifestError as error:
        assert not rows or "no usable row" in str(error) or home.name in str(error), error
    else:
        raise AssertionError(f"one of {rows} is a recording")
    _nothing_happened(str(rows), trap)


def _nothing_happened(what: str, trap: Trap) -> None:
    trap.settle()
    _seen[:] = [event for event in _seen if f"('127.0.0.1', {trap.port})" not in event]
    assert not (found := _seen + trap.sprung()), f"{what}: {found}"


_Write = Callable[[Path, list[str]], str]


def _parquet(home: Path, rows: list[str]) -> str:
    texts = pa.array([f"text {n}" for n in range(len(rows))], pa.string())
    path = home / "x.parquet"
    pq.write_table(pa.table({"audio": pa.array(rows, pa.string()), "text": texts}), path)
    return str(path)


def _structs(home: Path, rows: list[str]) -> str:
    """As `datasets` writes them: a column of bytes and paths."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    audio = pa.array([{"bytes": None, "path": row} for row in rows], kind)
    texts = pa.array([f"text {n}" for n in range(len(rows))], pa.string())
    path = home / "s.parquet"
    pq.write_table(pa.table({"audio": audio, "text": texts}), path)
    return str(path)


def _manifest(home: Path, rows: list[str]) -> str:
    path = home / "x.jsonl"
    lines = [json.dumps({"audio": row, "text": f"text {n}"}) for n, row in enumerate(rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def _table(home: Path, rows: list[str]) -> str:
    path = home / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text"])
        writer.writerows([row, f"text {n}"] for n, row in enumerate(rows))
    return str(path)
