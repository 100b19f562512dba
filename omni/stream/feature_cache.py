"""The feature cache: what the encoder computed once, kept by content.

A cache folder belongs to one encoder (weights, dtype, mode, margin, format). It holds append-only
shards: `NAME.bin`, the features one after another, and `NAME.arrow`, the table that says where each
one lies. The table is written last, so a shard exists whole or not at all, and any number of actors
write beside each other without locks, on local disk or in object storage.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from omni.storage.folder import open_folder
from omni.storage.retry import NO_SPACE

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)
_HELD_FLUSHES = 8  # of features in memory while storage is away


@dataclass(frozen=True)
class _Place:
    shard: str
    offset: int
    length: int
    crc32: int


class FeatureCache:
    """Bytes of features by content key, in one folder shared by readers and writers.

    location: a local folder, or a URI such as s3://bucket/cache.
    limit_bytes: no shard is written that would bring the folder over it. Writers that work beside
        each other may overshoot by one shard each.
    flush_bytes, flush_seconds: when `put` turns what it gathered into a shard. A killed writer
        loses at most that much work.
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
        self.full: str | None = None  # why nothing more is kept, in one line
        self._folder = open_folder(location)
        self._places: dict[str, list[_Place]] = {}  # damaged copies may lie beside a whole one
        self._shards: set[str] = set()
        self._stored_bytes = 0
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._flushed_at = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        return len({key for key, places in self._places.items() if places} | self._pending.keys())

    def __contains__(self, key: str) -> bool:
        """Whether the tables name it; only `get` finds out whether it is whole."""
        return bool(self._places.get(key)) or key in self._pending

    @property
    def location(self) -> str:
        """Where the cache lies, fit for messages."""
        return self._folder.location

    @property
    def stored_bytes(self) -> int:
        """Bytes of the features on disk, as far as this instance has seen."""
        return self._stored_bytes

    def refresh(self) -> None:
        """Take note of shards that other processes have finished since the last look."""
        try:
            if not self._folder.changed():
                return
            sizes = self._folder.list()
        except OSError:
            return  # storage is away: what this instance knows already is all there is for now
        for name in sizes:
            shard, _, suffix = name.rpartition(".")
            if suffix != "arrow" or shard in self._shards or f"{shard}.bin" not in sizes:
                continue
            self._shards.add(shard)
            self._stored_bytes += sizes[f"{shard}.bin"]
            for key, place in self._read_table(shard, sizes[f"{shard}.bin"]):
                self._places.setdefault(key, []).append(place)

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The features that are here; a damaged one counts as absent."""
        wanted = list(dict.fromkeys(keys))
        if any(key not in self for key in wanted):
            self.refresh()
        found: dict[str, bytes] = {}
        for key in wanted:
            if key in self._pending:
                found[key] = self._pending[key]
                continue
            for place in list(self._places.get(key, ())):
                if (data := self._read(place)) is not None:
                    found[key] = data
                    break
                self._places[key].remove(place)
        return found

    def put(self, items: Mapping[str, bytes]) -> None:
        """Add features; they are on disk after `flush`, or once enough came together."""
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
        """Write what was gathered as one shard, or say in `full` why it cannot be kept.

        Storage that is away costs nothing but memory: the next flush tries again, until too much
        has come together. With `strict` it is an OSError at once.
        """
        self._flushed_at = time.monotonic()
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        if self.limit_bytes is not None and pending:
            self.refresh()
            pending = self._within(pending, self.limit_bytes - self._stored_bytes)
        if not pending:
            return
        shard = uuid.uuid4().hex
        places: dict[str, _Place] = {}
        offset = 0
        for key, data in pending.items():
            places[key] = _Place(shard, offset, len(data), zlib.crc32(data))
            offset += len(data)
        rows = [
            {"key": key, "offset": p.offset, "length": p.length, "crc32": p.crc32}
            for key, p in places.items()
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
        try:
            self._folder.write(f"{shard}.bin", b"".join(pending.values()))
            self._folder.write(f"{shard}.arrow", sink.getvalue().to_pybytes())
        except OSError as error:
            if error.errno in NO_SPACE or offset > _HELD_FLUSHES * self.flush_bytes:
                self.full = f"{self._folder.location}: {error.strerror or error}"
                return
            self._pending, self._pending_bytes = pending, offset
            if strict:
                raise
            return
        self._shards.add(shard)
        self._stored_bytes += offset
        for key, place in places.items():
            self._places.setdefault(key, []).append(place)

    def _within(self, items: dict[str, bytes], room: int) -> dict[str, bytes]:
        """The first items that fit into `room` bytes."""
        kept = {}
        for key, data in items.items():
            room -= len(data)
            if room < 0:
                assert self.limit_bytes is not None
                self.full = f"{self._folder.location}: the limit of {self.limit_bytes / 1e9:g} GB"
                break
            kept[key] = data
        return kept

    def _read(self, place: _Place) -> bytes | None:
        try:
            data = self._folder.read(f"{place.shard}.bin", place.offset, place.length)
        except (OSError, ValueError):
            return None
        return data if zlib.crc32(data) == place.crc32 and len(data) == place.length else None

    def _read_table(self, shard: str, size: int) -> list[tuple[str, _Place]]:
        """Where a shard's features lie; nothing for a damaged or foreign file."""
        try:
            raw = self._folder.read(f"{shard}.arrow")
            table = pa.ipc.open_file(pa.py_buffer(raw)).read_all().cast(_SCHEMA)
            table.validate(full=True)  # a flipped offset inside would be read as an address
            rows = table.to_pylist()
            places = [(r["key"], _Place(shard, r["offset"], r["length"], r["crc32"])) for r in rows]
            return [
                (key, p) for key, p in places if p.offset >= 0 and 0 <= p.length <= size - p.offset
            ]
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
            return []


def more_room(format: str) -> str:
    """What to do about a full cache, for messages."""
    return "raise data.cache_gb" + (
        ", or halve the features with encoder.format int8" if format == "exact" else ""
    )
