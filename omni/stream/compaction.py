"""Compact a feature cache: few large shards and one sorted table of keys instead of many.

Writers and readers may be at work meanwhile. New files are complete before old ones are deleted,
and a reader whose shard has gone looks its features up again. A compaction that is killed leaves
the cache as it was, or as it will be; the next one removes what is left over.
"""

from __future__ import annotations

import contextlib
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from omni.storage.flat_folder import Folder, LocalFolder, open_folder
from omni.storage.path import join
from omni.stream.key_index import COMPLETE, KEYS, OLD, SHARD, read_old
from omni.stream.key_table import Entry, KeyTable, Row, parse, write_merged

SHARD_BYTES = 1 << 30
_SMALL_BYTES = SHARD_BYTES // 4
"""Shards up to this size are joined."""
_LEFT_OVER_SECONDS = 86_400.0
"""Age from which a shard without a table is what a killed writer left."""
_MANY_TABLES = 32
_MOST_BYTES = 4 << 30
_BATCH = 65_536


@dataclass(frozen=True)
class Compacted:
    """Counts before and after. shards: of features; tables: of keys; removed: left by the killed.

    damaged: features that were dropped, since they do not match their checksum.
    """

    shards: int
    shards_after: int
    tables: int
    keys: int
    damaged: int = 0
    removed: int = 0

    def __str__(self) -> str:
        dropped = f", {self.damaged:,} damaged ones dropped" if self.damaged else ""
        left = f", {self.removed:,} files of killed writers removed" if self.removed else ""
        return (
            f"{self.keys:,} keys of {self.tables:,} tables in one, {self.shards:,} shards in "
            f"{self.shards_after:,}{dropped}{left}"
        )


def compact_if_many(location: str | Path) -> Compacted | None:
    """Compact a cache of many tables, as far as that takes no longer than a minute or two."""
    tables = [name for name in open_folder(join(location, "keys")).list() if name.endswith(KEYS)]
    return compact(location, _MOST_BYTES) if len(tables) > _MANY_TABLES else None


def compact(location: str | Path, most_bytes: int | None = None) -> Compacted | None:
    """Join the small shards and all tables of a cache.

    most_bytes: features that are copied, at most; None: all that lie in small shards.
    Returns None where there is nothing to join, or another compaction is at work. Raises OSError.
    """
    folder, keys = open_folder(location), open_folder(join(location, "keys"))
    with _alone(keys) as alone:
        return _Compaction(folder, keys, most_bytes).run() if alone else None


@contextlib.contextmanager
def _alone(keys: Folder) -> Iterator[bool]:
    """Lock the folder on disk; two compactions in a bucket would copy twice, and harm nothing."""
    if not isinstance(keys, LocalFolder):
        yield True
        return
    keys.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(keys.path / ".lock", timeout=0):
            yield True
    except Timeout:
        yield False


class _Compaction:
    def __init__(self, folder: Folder, keys: Folder, most_bytes: int | None) -> None:
        self._folder, self._keys, self._most_bytes = folder, keys, most_bytes
        # In this order, so that the shard of every table is found.
        self._listed = keys.list()
        self._found = folder.list()
        self._damaged = 0

    def run(self) -> Compacted | None:
        tables, replaced = self._tables()
        sizes = {
            name.decode(): int(size)
            for table in tables
            for name, size in zip(table.names.tolist(), table.sizes.tolist(), strict=True)
        }
        small = self._small(sizes)
        lost = [shard for shard in sizes if shard + SHARD not in self._found]
        removed = self._remove_left_overs(sizes, replaced)
        if len(tables) < 2 and len(small) < 2 and not lost and COMPLETE in self._listed:
            return None
        fresh = list(self._join(tables, small)) if small else []
        name = uuid.uuid4().hex
        olds = [n for n in self._found if n.endswith(OLD)]
        spool = self._keys.spool()
        try:
            with spool.open("wb") as file:
                names = [n for n in self._listed if n.endswith(KEYS)]
                count = write_merged(file, [*tables, *fresh], [*names, *olds], [*small, *lost])
            self._keys.upload(name + KEYS, spool)
        finally:
            spool.unlink(missing_ok=True)
        self._keys.write(COMPLETE, b"")
        for old in (n for n in self._listed if n.endswith(KEYS)):
            self._keys.delete(old)
        for old in [*olds, *(shard + SHARD for shard in small)]:
            self._folder.delete(old)
        after = len(sizes) - len(small) - len(lost) + len(fresh)
        return Compacted(len(sizes), after, len(tables), count, self._damaged, removed)

    def _tables(self) -> tuple[list[KeyTable], set[str]]:
        """Read all tables but those that another one replaces."""
        found: dict[str, KeyTable] = {}
        for name, size in self._listed.items():
            if name.endswith(KEYS):
                with contextlib.suppress(ValueError):
                    found[name] = (
                        KeyTable.map(self._keys.local_copy(name, size))
                        if size > SHARD_BYTES // 1024
                        else parse(self._keys.read(name))
                    )
        for name in self._found:
            shard = name.removesuffix(OLD)
            if name.endswith(OLD) and shard + SHARD in self._found:
                table = read_old(self._folder, shard, self._found[shard + SHARD])
                if table is not None:
                    found[name] = table
        replaced = {name for table in found.values() for name in table.replaces}
        return [table for name, table in found.items() if name not in replaced], replaced

    def _small(self, sizes: dict[str, int]) -> list[str]:
        """Choose the shards to join, the smallest first."""
        small = sorted(
            (s for s, size in sizes.items() if size <= _SMALL_BYTES and s + SHARD in self._found),
            key=lambda shard: sizes[shard],
        )
        if self._most_bytes is not None:
            total = 0
            for number, shard in enumerate(small):
                total += sizes[shard]
                if total > self._most_bytes:
                    small = small[:number]
                    break
        return small if len(small) > 1 else []

    def _join(self, tables: list[KeyTable], small: list[str]) -> Iterator[KeyTable]:
        """Copy the whole features of small shards, each key once, into large shards."""
        by_shard: dict[str, list[tuple[str, Entry]]] = {shard: [] for shard in small}
        for table in tables:
            for first in range(0, len(table), _BATCH):
                for raw, entry in table.entries(first, first + _BATCH):
                    if entry.shard in by_shard:
                        by_shard[entry.shard].append((raw.hex(), entry))
        done: set[str] = set()
        left = list(small)
        while left:
            name, rows, size = uuid.uuid4().hex, [], 0
            spool = self._folder.spool()
            try:
                with spool.open("wb") as file:
                    while left and size < SHARD_BYTES - _SMALL_BYTES:
                        shard = left.pop(0)
                        data = self._folder.read(shard + SHARD)
                        entries = sorted(by_shard.pop(shard), key=lambda item: item[1].offset)
                        for key, e in entries:
                            part = data[e.offset : e.offset + e.length]
                            whole = len(part) == e.length and zlib.crc32(part) == e.crc32
                            self._damaged += not whole
                            if whole and key not in done:
                                done.add(key)
                                rows.append(Row(key, size, e.length, e.crc32))
                                size += file.write(part)
                self._folder.upload(name + SHARD, spool)
            finally:
                spool.unlink(missing_ok=True)
            yield KeyTable.of_shard(name, size, rows)

    def _remove_left_overs(self, sizes: dict[str, int], replaced: set[str]) -> int:
        """Delete what killed writers and compactions left; return the number of files."""
        count = 0
        for name in replaced & self._listed.keys():
            self._keys.delete(name)
            del self._listed[name]
            count += 1
        now = time.time()
        for name in self._found:
            unknown = name.endswith(SHARD) and name.removesuffix(SHARD) not in sizes
            if not unknown and not name.endswith(".tmp"):
                continue
            with contextlib.suppress(FileNotFoundError):  # A writer has renamed it since.
                if now - self._folder.modified(name) > _LEFT_OVER_SECONDS:
                    self._folder.delete(name)
                    count += 1
        return count
