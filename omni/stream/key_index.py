"""Index of a feature cache: which keys it holds, and in which shard.

    NAME.bin            a shard: features one after another
    keys/NAME.keys      sorted keys of one shard, or of many (see `omni.stream.key_table`)
    keys/complete       mark: no table lies outside of this folder
    NAME.arrow          table of a shard of version 0.1

A table is written after its shard, so a shard exists whole or not at all. Readers list the small
folder of tables, never that of the shards. Tables that a larger one replaces are named in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from omni.storage.digest import digest
from omni.storage.flat_folder import open_folder
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import join
from omni.stream.key_table import Entry, KeyTable, Row, halves, merge, parse, to_bytes

KEYS = ".keys"
COMPLETE = "complete"
OLD = ".arrow"
SHARD = ".bin"
_SMALL_BYTES = 1 << 20
"""Tables up to this size are held in memory, larger ones are mapped."""
_MOST_SMALL = 16
"""Tables in memory from which the smaller ones are merged."""
_DIGEST = b"digest"
_OLD_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)


@dataclass
class _Run:
    """A table, and the names of the files that it was read from."""

    table: KeyTable
    sources: set[str]


@dataclass
class _Sizes:
    """Bytes of shards by the name of their table."""

    known: dict[str, int] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(size for name, size in self.known.items() if name not in self.replaced)


class KeyIndex:
    """Keys of the cache at `location`, as of the last refresh, and those that were added."""

    def __init__(self, location: str | Path) -> None:
        self._shards = open_folder(location)
        self._folder = open_folder(join(location, "keys"))
        self._runs: list[_Run] = []
        self._sizes = _Sizes()
        self._opened = False
        self._complete = False
        self.refresh()

    def __len__(self) -> int:
        return sum(len(run.table) for run in self._runs)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards."""
        return self._sizes.total

    @property
    def tables(self) -> list[KeyTable]:
        return [run.table for run in self._runs]

    def find(self, keys: Sequence[str]) -> dict[str, list[Entry]]:
        """Return the copies of each key's features; keys without any are left out."""
        high, low = halves(keys)
        found: dict[str, list[Entry]] = {}
        for run in self._runs:
            for number, entry in run.table.find(high, low):
                found.setdefault(keys[number], []).append(entry)
        return found

    def contains(self, keys: Sequence[str]) -> np.ndarray:
        """Return (n,) whether features of each key are listed, whatever their number."""
        high, low = halves(keys)
        has = np.zeros(len(keys), bool)
        for run in self._runs:
            left = np.flatnonzero(~has)
            has[left] = run.table.contains(high[left], low[left])
        return has

    def refresh(self, force: bool = False) -> bool:
        """Read the tables that appeared since the last refresh; return whether there were any.

        While storage is unavailable, what is known already stays in use. force: list a bucket again
        however short the last time is ago.
        """
        try:
            if self._opened and not force and not self._folder.changed():
                return False
            sizes = self._folder.list()
            fresh = self._read_old(sizes) if not self._opened else []
        except OSError:
            return False
        self._opened = True
        self._complete = self._complete or COMPLETE in sizes
        names = [n for n in sizes if n.endswith(KEYS) and n not in self._sizes.known]
        read = parallel_map(lambda name: (name, self._read(name, sizes[name])), names)
        fresh += [(name, table) for name, table in read if table is not None]
        for name, table in fresh:
            self._add(name, table)
        return bool(fresh)

    def write(self, shard: str, table: KeyTable) -> None:
        """Write the table of a new shard. Raises OSError."""
        self._folder.write(shard + KEYS, to_bytes(table))
        if not self._complete:
            self._complete = True
            with contextlib.suppress(OSError):
                if not self._old_names(self._shards.list()):
                    self._folder.write(COMPLETE, b"")

    def add(self, shard: str, table: KeyTable) -> None:
        """Use the table of a shard that this process has written."""
        self._add(shard + KEYS, table)

    def _add(self, name: str, table: KeyTable) -> None:
        self._sizes.known[name] = table.stored_bytes
        self._sizes.replaced.update(table.replaces)
        self._runs = [r for r in self._runs if not r.sources <= self._sizes.replaced]
        if name in self._sizes.replaced:
            return
        self._runs.append(_Run(table, {name}))
        small = [r for r in self._runs if not r.table.mapped]
        if len(small) > _MOST_SMALL:
            small = sorted(small, key=lambda run: len(run.table))[: _MOST_SMALL * 3 // 4]
            joined = _Run(merge([r.table for r in small]), set().union(*(r.sources for r in small)))
            self._runs = [r for r in self._runs if r not in small] + [joined]

    def _read(self, name: str, size: int) -> KeyTable | None:
        """Read a table; None for one that is damaged, or has been replaced meanwhile."""
        try:
            if size <= _SMALL_BYTES:
                return parse(self._folder.read(name))
            return KeyTable.map(self._folder.local_copy(name, size))
        except (OSError, ValueError):
            return None

    # -- tables of version 0.1 -----------------------------------------------------------------

    def _read_old(self, sizes: Iterable[str]) -> list[tuple[str, KeyTable]]:
        if COMPLETE in sizes:
            return []
        found = self._shards.list()
        names = self._old_names(found)
        read = parallel_map(
            lambda shard: (shard + OLD, read_old(self._shards, shard, found[shard + SHARD])), names
        )
        return [(name, table) for name, table in read if table is not None]

    @staticmethod
    def _old_names(found: dict[str, int]) -> list[str]:
        names = [name.removesuffix(OLD) for name in found if name.endswith(OLD)]
        return [name for name in names if name + SHARD in found]


def read_old(folder: Any, shard: str, size: int) -> KeyTable | None:
    """Read the table that version 0.1 wrote for a shard of `size` bytes; None if it is damaged."""
    try:
        table = pa.ipc.open_file(pa.py_buffer(folder.read(shard + OLD))).read_all()
        wanted = (table.schema.metadata or {}).get(_DIGEST)
        table = table.cast(_OLD_SCHEMA)
        table.validate(full=True)  # Without it a flipped offset is read as a memory address.
        rows = table.to_pylist()
        values = [(r["key"], r["offset"], r["length"], r["crc32"]) for r in rows]
        if wanted is not None and digest(repr(values), size=16).encode() != wanted:
            return None  # A damaged row could name the features of another recording.
        good = [Row(*v) for v in values if v[1] >= 0 and 0 <= v[2] <= size - v[1]]
        return KeyTable.of_shard(shard, size, good)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, OverflowError):
        return None
