"""The feature cache: what the encoder computed once, kept by content.

A cache folder belongs to one encoder (weights, dtype, mode, margin). It holds append-only shards:
`NAME.bin`, the features one after another, and `NAME.arrow`, the table that says where each one
lies. The table is renamed into place last, so a shard exists whole or not at all, and any number
of actors write beside each other without locks.
"""

from __future__ import annotations

import os
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)
_OPEN_FILES = 32


@dataclass(frozen=True)
class _Place:
    shard: str
    offset: int
    length: int
    crc32: int


class FeatureCache:
    """Bytes of features by content key, in one folder shared by readers and writers.

    flush_bytes, flush_seconds: when `put` turns what it gathered into a shard. A killed writer
    loses at most that much work.
    """

    def __init__(
        self, folder: Path, *, flush_bytes: int = 8 << 20, flush_seconds: float = 5.0
    ) -> None:
        self.folder = folder
        self.flush_bytes = flush_bytes
        self.flush_seconds = flush_seconds
        self._places: dict[str, list[_Place]] = {}  # damaged copies may lie beside a whole one
        self._shards: set[str] = set()
        self._listed_ns = -1
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._flushed_at = time.monotonic()
        self._files: OrderedDict[str, int] = OrderedDict()
        self.refresh()

    def __len__(self) -> int:
        return len({key for key, places in self._places.items() if places} | self._pending.keys())

    def refresh(self) -> None:
        """Take note of shards that other processes have finished since the last look."""
        try:
            changed_ns = os.stat(self.folder).st_mtime_ns
        except OSError:
            return
        # A folder's time has finite resolution: one that changed just now may change again in it.
        if changed_ns == self._listed_ns and time.time_ns() - changed_ns > 2_000_000_000:
            return
        self._listed_ns = changed_ns
        for path in self.folder.glob("*.arrow"):
            if path.stem in self._shards:
                continue
            self._shards.add(path.stem)
            for key, place in _read_table(path):
                self._places.setdefault(key, []).append(place)

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The features that are here; a damaged one counts as absent."""
        wanted = list(dict.fromkeys(keys))
        if any(not self._places.get(key) and key not in self._pending for key in wanted):
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
        for key, data in items.items():
            if key not in self._pending and not self._places.get(key):
                self._pending[key] = data
                self._pending_bytes += len(data)
        waited = time.monotonic() - self._flushed_at
        if self._pending_bytes >= self.flush_bytes or waited >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered as one shard."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        places: dict[str, _Place] = {}
        offset = 0
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            for key, data in self._pending.items():
                file.write(data)
                places[key] = _Place(name, offset, len(data), zlib.crc32(data))
                offset += len(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / f"{name}.bin")
        rows = [
            {"key": key, "offset": p.offset, "length": p.length, "crc32": p.crc32}
            for key, p in places.items()
        ]
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
        os.replace(temporary, self.folder / f"{name}.arrow")
        self._shards.add(name)
        for key, place in places.items():
            self._places.setdefault(key, []).append(place)
        self._pending, self._pending_bytes = {}, 0

    def _read(self, place: _Place) -> bytes | None:
        try:
            data = os.pread(self._file(place.shard), place.length, place.offset)
        except OSError:
            return None
        return data if zlib.crc32(data) == place.crc32 and len(data) == place.length else None

    def _file(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        descriptor = os.open(self.folder / f"{shard}.bin", os.O_RDONLY)
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


def _read_table(path: Path) -> list[tuple[str, _Place]]:
    """Where a shard's features lie; nothing for a damaged or foreign file."""
    try:
        size = path.with_suffix(".bin").stat().st_size
        table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all().cast(_SCHEMA)
        table.validate(full=True)  # a flipped offset inside would be read as an address
        rows = table.to_pylist()
        places = [(r["key"], _Place(path.stem, r["offset"], r["length"], r["crc32"])) for r in rows]
        return [(key, p) for key, p in places if p.offset >= 0 and 0 <= p.length <= size - p.offset]
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return []
