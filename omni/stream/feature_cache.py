"""Cache of encoder features by content hash, in append-only shards.

A cache folder belongs to one encoder (weights, dtype, mode, margin, format). A shard is two files:
`NAME.bin`, the features one after another, and `NAME.arrow`, their keys, offsets and checksums. The
table is written last, so a shard exists whole or not at all, and any number of actors write beside
each other without locks, on local disk or in object storage.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from omni.storage.digest import digest
from omni.storage.flat_folder import open_folder
from omni.storage.retry import NO_SPACE

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)
_DIGEST = b"digest"
"""Metadata of a table: hash of its rows. Tables of 0.1 have none."""
# While storage is unavailable, so many times `flush_bytes` of features wait in memory.
_MOST_WAITING = 8


@dataclass(frozen=True)
class _Entry:
    """Location and checksum of one recording's features."""

    shard: str
    offset: int
    length: int
    crc32: int


class FeatureCache:
    """Bytes of features by content key, in one folder shared by readers and writers.

    location: a local folder, or a URI such as s3://bucket/cache.
    limit_bytes: no shard is written that would bring the folder over it. Writers that work beside
        each other may overshoot by one shard each.
    flush_bytes, flush_seconds: size and age at which `put` writes a shard. A killed writer loses
        at most that much work.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        limit_bytes: int | None = None,
        flush_bytes: int = 8 << 20,
        flush_seconds: float = 5.0,
    ) -> None:
        self.flush_bytes = flush_bytes
        self.flush_seconds = flush_seconds
        self.limit_bytes = limit_bytes
        self.full: str | None = None
        """Reason why nothing more is kept, in one line."""
        self._folder = open_folder(location)
        # A key may have several entries: a damaged copy beside a whole one.
        self._entries: dict[str, list[_Entry]] = {}
        self._shards: set[str] = set()
        self._stored_bytes = 0
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._flushed_at = time.monotonic()
        self.refresh()

    def __iter__(self) -> Iterator[str]:
        stored = {key for key, entries in self._entries.items() if entries}
        return iter(stored | self._pending.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: str) -> bool:
        """Look the key up in the tables; only `get` notices that its features are damaged."""
        return bool(self._entries.get(key)) or key in self._pending

    @property
    def location(self) -> str:
        """Location of the cache without credentials, for messages."""
        return self._folder.location

    @property
    def stored_bytes(self) -> int:
        """Bytes of features in storage, as of the last refresh."""
        return self._stored_bytes

    def refresh(self) -> None:
        """Read the tables of shards that other processes finished since the last refresh."""
        try:
            if not self._folder.changed():
                return
            sizes = self._folder.list()
        except OSError:
            return  # Listing failed: keep using the shards already known.
        for name in sizes:
            shard, _, suffix = name.rpartition(".")
            if suffix != "arrow" or shard in self._shards or f"{shard}.bin" not in sizes:
                continue
            self._shards.add(shard)
            self._stored_bytes += sizes[f"{shard}.bin"]
            for key, entry in self._read_table(shard, sizes[f"{shard}.bin"]):
                self._entries.setdefault(key, []).append(entry)

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Read the features that are cached; damaged ones count as absent."""
        wanted = list(dict.fromkeys(keys))
        if any(key not in self for key in wanted):
            self.refresh()
        found: dict[str, bytes] = {}
        for key in wanted:
            if key in self._pending:
                found[key] = self._pending[key]
                continue
            for entry in list(self._entries.get(key, ())):
                if (data := self._read(entry)) is not None:
                    found[key] = data
                    break
                self._entries[key].remove(entry)
        return found

    def put(self, items: Mapping[str, bytes]) -> None:
        """Add features, and write a shard once enough are pending or the oldest are old."""
        if self.full:
            return
        for key, data in items.items():
            if key not in self:
                self._pending[key] = data
                self._pending_bytes += len(data)
        waited = time.monotonic() - self._flushed_at
        room = None if self.limit_bytes is None else self.limit_bytes - self._stored_bytes
        enough = self._pending_bytes >= self.flush_bytes or waited >= self.flush_seconds
        if enough or (room is not None and self._pending_bytes > room):
            self.flush()

    def flush(self, strict: bool = False) -> None:
        """Write the pending features as one shard, or set `full` to the reason they are not kept.

        While storage is unavailable they stay in memory up to a limit, and the next flush tries
        again. strict: raise OSError instead.
        """
        self._flushed_at = time.monotonic()
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        if self.limit_bytes is not None and pending:
            self.refresh()
            pending = self._within(pending, self.limit_bytes - self._stored_bytes)
        if not pending:
            return
        shard = uuid.uuid4().hex
        entries: dict[str, _Entry] = {}
        offset = 0
        for key, data in pending.items():
            entries[key] = _Entry(shard, offset, len(data), zlib.crc32(data))
            offset += len(data)
        rows = [
            {"key": key, "offset": e.offset, "length": e.length, "crc32": e.crc32}
            for key, e in entries.items()
        ]
        table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_DIGEST: _digest(rows)}))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        try:
            self._folder.write(f"{shard}.bin", b"".join(pending.values()))
            self._folder.write(f"{shard}.arrow", sink.getvalue().to_pybytes())
        except OSError as error:
            if error.errno in NO_SPACE or offset > _MOST_WAITING * self.flush_bytes:
                self.full = f"{self._folder.location}: {error.strerror or error}"
                return
            self._pending, self._pending_bytes = pending, offset
            if strict:
                raise
            return
        self._shards.add(shard)
        self._stored_bytes += offset
        for key, entry in entries.items():
            self._entries.setdefault(key, []).append(entry)

    def _within(self, items: dict[str, bytes], room: int) -> dict[str, bytes]:
        """Take the first items that fit into `room` bytes; set `full` when some do not."""
        kept = {}
        for key, data in items.items():
            room -= len(data)
            if room < 0:
                assert self.limit_bytes is not None
                self.full = f"{self._folder.location}: the limit of {self.limit_bytes / 1e9:g} GB"
                break
            kept[key] = data
        return kept

    def _read(self, entry: _Entry) -> bytes | None:
        try:
            data = self._folder.read(f"{entry.shard}.bin", entry.offset, entry.length)
        except (OSError, ValueError):
            return None
        return data if zlib.crc32(data) == entry.crc32 and len(data) == entry.length else None

    def _read_table(self, shard: str, size: int) -> list[tuple[str, _Entry]]:
        """Read the keys and entries of a shard of `size` bytes; none from a damaged table."""
        try:
            raw = self._folder.read(f"{shard}.arrow")
            table = pa.ipc.open_file(pa.py_buffer(raw)).read_all()
            wanted = (table.schema.metadata or {}).get(_DIGEST)
            table = table.cast(_SCHEMA)
            table.validate(full=True)  # Without it a flipped offset is read as a memory address.
            rows = table.to_pylist()
            if wanted is not None and _digest(rows) != wanted:
                return []  # A damaged row could name the features of another recording.
            entries = [
                (r["key"], _Entry(shard, r["offset"], r["length"], r["crc32"])) for r in rows
            ]
            return [
                (key, e) for key, e in entries if e.offset >= 0 and 0 <= e.length <= size - e.offset
            ]
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
            return []


def _digest(rows: list[dict[str, Any]]) -> bytes:
    values = [(r["key"], r["offset"], r["length"], r["crc32"]) for r in rows]
    return digest(repr(values), size=16).encode()


def advice_when_full(format: str) -> str:
    """Return the settings that make room in a full cache, for messages."""
    return "raise data.cache_gb" + (
        ", or halve the features with encoder.format int8" if format == "exact" else ""
    )
