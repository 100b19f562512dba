"""Sorted tables of keys and of the locations of their features, in memory or mapped from a file.

A file is read where it is needed, so that one of 30 million keys (1.3 GB) costs a process little
memory, and the processes of a node share its pages; looking a key up reads two or three of them:

    omnikey1, length of the header, header (JSON), zeros up to a multiple of 64
    uint64 fences: every 128th of the next column
    (n,) uint64 first halves of the keys, ascending
    (n,) records: second half, offset, length, shard number, CRC-32 of the features, check
    (m,) names of the shards, padded with zeros; (m,) uint64 their bytes

A key is 16 bytes. A check covers its record, so that a damaged record is an absent one; the header
has a digest of the shards.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from omni.storage.digest import digest

_MAGIC = b"omnikey1"
_ALIGNED = 64
_RECORD = np.dtype(
    [
        ("low", "<u8"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("shard", "<u4"),
        ("crc32", "<u4"),
        ("check", "<u4"),
    ]
)
# Odd numbers from the fractional part of the golden ratio and the finalizers of MurmurHash3.
_FACTORS = [
    np.uint64(n)
    for n in (
        0x9E3779B97F4A7C15,
        0xFF51AFD7ED558CCD,
        0xC4CEB9FE1A85EC53,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
    )
]
_NO_SHARD = 0xFFFFFFFF
_FENCE = 128
"""Rows between two fences."""
_KEYS_AT_ONCE = 1024
"""Keys that are looked up together, with a kilobyte of memory for each."""
_RANGE_ROWS = 1 << 20
"""Rows that are sorted at a time when files are merged."""


@dataclass(frozen=True)
class Entry:
    """Location and checksum of one recording's features."""

    shard: str
    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Row:
    """One key with its features' place in a shard."""

    key: str
    offset: int
    length: int
    crc32: int


def halves(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two halves of each key as (n,) uint64."""
    pairs = np.frombuffer(b"".join(map(_bytes_of, keys)), ">u8").astype(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _bytes_of(key: str) -> bytes:
    """Return the 16 bytes of a content key; of any other text, a hash of 16 bytes."""
    if len(key) == 32 and key.isalnum() and key == key.lower():
        try:
            return bytes.fromhex(key)
        except ValueError:
            pass
    return blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()


class KeyTable:
    """high: (n,) ascending; records: (n,); names, sizes: (m,) of the shards.

    replaces: names of the files that this one was merged from.
    """

    def __init__(
        self,
        high: np.ndarray,
        records: np.ndarray,
        names: np.ndarray,
        sizes: np.ndarray,
        replaces: Sequence[str] = (),
        fences: np.ndarray | None = None,
    ) -> None:
        self.high, self.records, self.names, self.sizes = high, records, names, sizes
        self.replaces = list(replaces)
        self._fences = np.array(high[::_FENCE] if fences is None else fences)
        # Looking keys up reads the file: mapped pages, and many around each of them, would count as
        # this process's memory, and mapping them takes longer than to read some bytes.
        self._file: FileIO | None = None
        self._high_at = self._records_at = 0

    def __len__(self) -> int:
        return len(self.high)

    @property
    def mapped(self) -> bool:
        """True for a table that is read from its file as needed."""
        return self._file is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the shards."""
        return int(self.sizes.sum())

    @classmethod
    def map(cls, path: Path) -> KeyTable:
        """Map a file into memory. Raises OSError, and ValueError if it is damaged."""
        file = FileIO(path)
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        table = parse(mapped)
        table._file = file
        # The columns end with those of the shards.
        shards = len(table.names) * (table.names.dtype.itemsize + 8)
        table._records_at = len(mapped) - shards - len(table) * _RECORD.itemsize
        table._high_at = table._records_at - len(table) * 8
        return table

    @classmethod
    def of_shard(cls, name: str, size: int, rows: Sequence[Row]) -> KeyTable:
        """Make the table of one shard of `size` bytes."""
        columns = {
            column: np.array([getattr(row, column) for row in rows], _RECORD[column])
            for column in ("offset", "length", "crc32")
        }
        return cls.of_columns(name, size, *halves([row.key for row in rows]), **columns)

    @classmethod
    def of_columns(
        cls,
        name: str,
        size: int,
        high: np.ndarray,
        low: np.ndarray,
        *,
        offset: np.ndarray,
        length: np.ndarray,
        crc32: np.ndarray,
    ) -> KeyTable:
        """Make the table of one shard from (n,) arrays, of the keys' halves and of their places."""
        records = np.zeros(len(high), _RECORD)
        for column, values in zip(
            ("low", "offset", "length", "crc32"), (low, offset, length, crc32), strict=True
        ):
            records[column] = values
        order = np.lexsort((offset, low, high))
        high, records = high[order], records[order]
        records["check"] = _checks(high, records)
        return cls(high, records, np.array([name.encode()]), np.array([size], np.uint64))

    def find(self, high: np.ndarray, low: np.ndarray) -> list[tuple[int, Entry]]:
        """Look keys up; return (number of the key, entry) of each copy of its features."""
        found: list[tuple[int, Entry]] = []
        for numbers, records in self._matches(high, low):
            for number, record in zip(numbers.tolist(), records.tolist(), strict=True):
                _, offset, length, shard, crc32, _ = record
                name = self.names[shard].decode(errors="replace")
                found.append((number, Entry(name, offset, length, crc32)))
        return found

    def contains(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Return (n,) whether the table has each key."""
        has = np.zeros(len(high), bool)
        for numbers, _ in self._matches(high, low):
            has[numbers] = True
        return has

    def _matches(
        self, high: np.ndarray, low: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield numbers of keys and their valid records: the first copy of each, the second, ..."""
        for start in range(0, len(high), _KEYS_AT_ONCE):
            numbers = np.arange(start, min(start + _KEYS_AT_ONCE, len(high)))
            at = self._first(high[numbers])
            while True:
                inside = at < len(self.high)
                numbers, at = numbers[inside], at[inside]
                same = self._high_of(at) == high[numbers]
                numbers, at = numbers[same], at[same]
                if not len(at):
                    break
                records = self._records_of(at)
                right = (records["low"] == low[numbers]) & self._valid(high[numbers], records)
                yield numbers[right], records[right]
                at = at + 1

    def _first(self, high: np.ndarray) -> np.ndarray:
        """Return the first row of each key or, without one, that of the next key."""
        if not len(self.high):
            return np.zeros(len(high), np.int64)
        starts = np.maximum(np.searchsorted(self._fences, high) - 1, 0) * _FENCE
        rows = starts[:, None] + np.arange(_FENCE)
        last = len(self.high) - 1
        if self._file is None:
            windows = self.high[np.minimum(rows, last)]
        else:
            raw = self._pread(self._high_at + 8 * starts, 8 * _FENCE)
            windows = np.frombuffer(raw, "<u8").reshape(-1, _FENCE)
        smaller = (windows < high[:, None]) & (rows <= last)
        return np.asarray(starts + smaller.sum(axis=1))

    def _high_of(self, rows: np.ndarray) -> np.ndarray:
        if self._file is None:
            return np.asarray(self.high[rows])
        return np.frombuffer(self._pread(self._high_at + 8 * rows, 8), "<u8")

    def _records_of(self, rows: np.ndarray) -> np.ndarray:
        if self._file is None:
            return np.asarray(self.records[rows])
        size = _RECORD.itemsize
        return np.frombuffer(self._pread(self._records_at + size * rows, size), _RECORD)

    def _pread(self, places: np.ndarray, size: int) -> bytes:
        """Read `size` bytes of the file from each place, with zeros for those beyond its end."""
        assert self._file is not None
        number = self._file.fileno()
        return b"".join(os.pread(number, size, at).ljust(size, b"\0") for at in places.tolist())

    def entries(self, first: int, last: int) -> Iterator[tuple[bytes, Entry]]:
        """Yield the 16 bytes of each key of rows [first, last), and its entry, if it is whole."""
        high, records = self.high[first:last], self.records[first:last]
        valid = self._valid(high, records)
        pairs = np.stack([high, records["low"]], axis=1).astype(">u8")
        for number in np.flatnonzero(valid).tolist():
            _, offset, length, shard, crc32, _ = records[number].item()
            name = self.names[shard].decode(errors="replace")
            yield pairs[number].tobytes(), Entry(name, offset, length, crc32)

    def _valid(self, high: np.ndarray, records: np.ndarray) -> np.ndarray:
        valid = _checks(high, records) == records["check"]
        valid &= records["shard"] < len(self.names)
        if not len(self.sizes):
            return np.zeros(len(records), bool)
        sizes = self.sizes[np.where(valid, records["shard"], 0)]
        valid &= records["length"] <= sizes
        valid &= records["offset"] <= sizes - np.minimum(records["length"], sizes)
        return np.asarray(valid)


def _checks(high: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Mix each key and location into 32 bits."""
    one, two, three, four, five = _FACTORS
    mixed = np.asarray(high, np.uint64) * one
    mixed ^= records["low"] * two
    mixed ^= records["offset"] * three
    mixed ^= records["length"] * four
    small = (records["shard"].astype(np.uint64) << np.uint64(32)) | records["crc32"]
    mixed ^= small * five
    mixed ^= mixed >> np.uint64(31)
    mixed *= two
    mixed ^= mixed >> np.uint64(29)
    mixed *= three
    return np.asarray(mixed >> np.uint64(32)).astype(np.uint32)


# -- files -------------------------------------------------------------------------------------


def parse(data: Any) -> KeyTable:
    """Read a table from a buffer, without a copy. Raises ValueError if it is damaged."""
    raw = memoryview(data).cast("B")
    if bytes(raw[:8]) != _MAGIC or len(raw) < 16:
        raise ValueError("not a table of keys")
    length = int.from_bytes(raw[8:16], "little")
    if length > len(raw) - 16:
        raise ValueError("the table is cut off")
    try:
        header = json.loads(bytes(raw[16 : 16 + length]))
        count, shards, width = (int(header[name]) for name in ("count", "shards", "width"))
        replaces = [str(name) for name in header["replaces"]]
        wanted = header["digest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("the header is damaged") from None
    first = _rounded_up(16 + length)
    fences = -(-count // _FENCE)
    sizes_of = [8 * fences, 8 * count, _RECORD.itemsize * count, width * shards, 8 * shards]
    if min(count, shards, width - 1) < 0 or first + sum(sizes_of) != len(raw):
        raise ValueError("the table is cut off")
    places = np.cumsum([first, *sizes_of])
    tail = raw[places[3] :]
    if _digest(count, shards, width, replaces, tail) != wanted:
        raise ValueError("the names of the shards are damaged")
    return KeyTable(
        np.frombuffer(raw, "<u8", count, places[1]),
        np.frombuffer(raw, _RECORD, count, places[2]),
        np.frombuffer(raw, f"S{width}", shards, places[3]),
        np.frombuffer(raw, "<u8", shards, places[4]),
        replaces,
        np.frombuffer(raw, "<u8", fences, places[0]),
    )


def to_bytes(table: KeyTable) -> bytes:
    """Return the content of the file of a small table."""
    return b"".join(
        [
            _head(len(table), table.names, table.sizes, table.replaces),
            table.high[::_FENCE].astype("<u8").tobytes(),
            table.high.astype("<u8").tobytes(),
            table.records.tobytes(),
            table.names.tobytes(),
            table.sizes.astype("<u8").tobytes(),
        ]
    )


def _head(count: int, names: np.ndarray, sizes: np.ndarray, replaces: Sequence[str]) -> bytes:
    tail = names.tobytes() + sizes.astype("<u8").tobytes()
    header = {
        "count": count,
        "shards": len(names),
        "width": names.dtype.itemsize,
        "replaces": list(replaces),
        "digest": _digest(count, len(names), names.dtype.itemsize, replaces, tail),
    }
    text = json.dumps(header).encode()
    head = _MAGIC + len(text).to_bytes(8, "little") + text
    return head.ljust(_rounded_up(len(head)), b"\0")


def _digest(count: int, shards: int, width: int, replaces: Sequence[str], tail: Any) -> str:
    return digest(repr((count, shards, width, list(replaces))), tail, size=16)


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


# -- merging -----------------------------------------------------------------------------------


def merge(tables: Sequence[KeyTable]) -> KeyTable:
    """Merge tables in memory; rows that are damaged or occur twice are dropped."""
    names, sizes, numbers = _joined_shards(tables)
    parts = list(_sorted_ranges(tables, numbers))
    high = np.concatenate([part[0] for part in parts] or [np.zeros(0, np.uint64)])
    records = np.concatenate([part[1] for part in parts] or [np.zeros(0, _RECORD)])
    return KeyTable(high, records, names, sizes)


def write_merged(
    file: IO[bytes],
    tables: Sequence[KeyTable],
    replaces: Sequence[str],
    without: Collection[str] = (),
) -> int:
    """Merge tables of any size into a file, a range of keys at a time; return the rows.

    without: shards whose rows are left out.
    """
    names, sizes, numbers = _joined_shards(tables, without)
    count = 0
    fences: list[np.ndarray] = []
    with tempfile.TemporaryFile() as highs, tempfile.TemporaryFile() as records:
        for high, part in _sorted_ranges(tables, numbers):
            highs.write(high.astype("<u8").tobytes())
            records.write(part.tobytes())
            fences.append(high[-count % _FENCE :: _FENCE])
            count += len(high)
        file.write(_head(count, names, sizes, replaces))
        file.write(b"".join(part.astype("<u8").tobytes() for part in fences))
        for column in (highs, records):
            column.seek(0)
            shutil.copyfileobj(column, file, 8 << 20)
    file.write(names.tobytes())
    file.write(sizes.astype("<u8").tobytes())
    return count


def _joined_shards(
    tables: Sequence[KeyTable], without: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return names and sizes of all shards, and for each table the new numbers of its own.

    Shards that are left out have the number `_NO_SHARD`.
    """
    width = max([t.names.dtype.itemsize for t in tables if len(t.names)] or [1])
    every = [table.names.astype(f"S{width}") for table in tables]
    names, first, inverse = np.unique(
        np.concatenate([np.zeros(0, f"S{width}"), *every]), return_index=True, return_inverse=True
    )
    sizes = np.concatenate([np.zeros(0, np.uint64), *(t.sizes for t in tables)])[first]
    kept = ~np.isin(names, np.array([name.encode() for name in without], f"S{width}"))
    numbers = np.where(kept, np.cumsum(kept) - 1, _NO_SHARD).astype(np.uint32)[inverse]
    ends = np.cumsum([len(part) for part in every])
    return names[kept], sizes[kept], np.split(numbers, ends[:-1])


def _sorted_ranges(
    tables: Sequence[KeyTable], numbers: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield first halves and records of one range of keys after another, sorted, each once."""
    total = sum(map(len, tables))
    ranges = -(-total // _RANGE_ROWS)
    bounds = [(number << 64) // max(ranges, 1) for number in range(ranges)]
    starts = [np.searchsorted(table.high, np.array(bounds, np.uint64)).tolist() for table in tables]
    for number in range(ranges):
        highs, parts = [], []
        for table, shards, start in zip(tables, numbers, starts, strict=True):
            last = start[number + 1] if number + 1 < ranges else len(table)
            high = np.array(table.high[start[number] : last], np.uint64)
            records = np.array(table.records[start[number] : last])
            valid = table._valid(high, records)
            high, records = high[valid], records[valid]
            records["shard"] = shards[records["shard"]] if len(shards) else _NO_SHARD
            known = records["shard"] != _NO_SHARD
            highs.append(high[known])
            parts.append(records[known])
        high, records = np.concatenate(highs), np.concatenate(parts)
        order = np.lexsort((records["offset"], records["shard"], records["low"], high))
        high, records = high[order], records[order]
        fresh = np.ones(len(high), bool)
        fresh[1:] = high[1:] != high[:-1]
        for column in ("low", "shard", "offset"):
            fresh[1:] |= records[column][1:] != records[column][:-1]
        high, records = high[fresh], records[fresh]
        records["check"] = _checks(high, records)
        yield high, records
