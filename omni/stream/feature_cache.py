"""Cache of encoder features by content hash, in append-only shards.

A cache folder belongs to one encoder (weights, dtype, mode, margin, format); its files are those
of `omni.stream.key_index`. Any number of actors write beside each other without locks, on local
disk or in object storage; `omni.stream.compaction` joins what they wrote.
"""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from omni.storage.flat_folder import Range, open_folder
from omni.storage.retry import NO_SPACE
from omni.stream.key_index import KeyIndex
from omni.stream.key_table import Entry, KeyTable, Row

# While storage is unavailable, so many times `flush_bytes` of features wait in memory.
_MOST_WAITING = 4
_KEYS_AT_ONCE = 4096
_AGE_SHARE = 0.05
"""Share of a writer's life that features wait, at most, once that is more than `flush_seconds`."""
_LONGEST_AGE = 300.0


class FeatureCache:
    """Bytes of features by content key, in one folder shared by readers and writers.

    location: a local folder, or a URI such as s3://bucket/cache.
    limit_bytes: no shard is written that would bring the folder over it. Writers that work beside
        each other may overshoot by one shard each.
    flush_bytes, flush_seconds: size and age at which `put` has a thread write a shard. The age
        grows to a twentieth of the writer's own, and to five minutes at most, so that a long epoch
        leaves few shards. A killed writer loses the shard that is not written yet.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        limit_bytes: int | None = None,
        flush_bytes: int = 64 << 20,
        flush_seconds: float = 5.0,
    ) -> None:
        self.flush_bytes = flush_bytes
        self.flush_seconds = flush_seconds
        self.limit_bytes = limit_bytes
        self.full: str | None = None
        """Reason why nothing more is kept, in one line."""
        self._folder = open_folder(location)
        self._index = KeyIndex(location)
        self._damaged: set[Entry] = set()
        self._lock = threading.RLock()
        """Held for the index and for what is pending, not while features are read or written."""
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._writing: dict[str, bytes] = {}
        self._writer: threading.Thread | None = None
        self._began = self._flushed_at = time.monotonic()

    def __iter__(self) -> Iterator[str]:
        """Yield the content keys in storage and pending."""
        with self._lock:
            waiting = {**self._writing, **self._pending}
            keys = dict.fromkeys(
                key.hex()
                for table in self._index.tables
                for key, entry in table.entries(0, len(table))
                if entry not in self._damaged
            )
        return iter(dict.fromkeys([*keys, *waiting]))

    def __len__(self) -> int:
        with self._lock:
            stored = {
                key
                for table in self._index.tables
                for key, entry in table.entries(0, len(table))
                if entry not in self._damaged
            }
            waiting = {**self._writing, **self._pending}
            return len(stored) + len(self._absent_in_storage(list(waiting)))

    def __contains__(self, key: str) -> bool:
        """Look the key up in the tables; only `get` notices that its features are damaged."""
        return not self.absent([key])

    @property
    def location(self) -> str:
        """Location of the cache without credentials, for messages."""
        return self._folder.location

    @property
    def stored_bytes(self) -> int:
        """Bytes of features in storage, as of the last refresh."""
        return self._index.stored_bytes

    def absent(self, keys: Sequence[str]) -> list[str]:
        """Return the keys, of a list, whose features are neither in a table nor pending."""
        with self._lock:
            unknown = [k for k in keys if k not in self._pending and k not in self._writing]
            return self._absent_in_storage(unknown)

    def _absent_in_storage(self, keys: Sequence[str]) -> list[str]:
        has = self._index.contains(keys)
        if self._damaged:
            for first in range(0, len(keys), _KEYS_AT_ONCE):
                part = keys[first : first + _KEYS_AT_ONCE]
                whole = self._locate(part)
                has[first : first + _KEYS_AT_ONCE] = [key in whole for key in part]
        return [key for key, known in zip(keys, has.tolist(), strict=True) if not known]

    def refresh(self) -> bool:
        """Read the tables of shards that others finished; return whether there were any."""
        with self._lock:
            return self._index.refresh()

    # -- reading -------------------------------------------------------------------------------

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Read the features that are cached, many at a time.

        Damaged ones count as absent, and so do, this time, those that the storage does not deliver.
        """
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            waiting = {**self._writing, **self._pending}
            stored = [key for key in wanted if key not in waiting]
            places = self._locate(stored)
            if len(places) < len(stored) and self._index.refresh():
                places = self._locate(stored)
        found, gone = self._read(places)
        if gone:
            # A compaction may have moved them.
            with self._lock:
                moved = self._locate(gone) if self._index.refresh(force=True) else {}
            found |= self._read(moved)[0]
        known = {**found, **waiting}
        return {key: known[key] for key in wanted if key in known}

    def _locate(self, keys: Sequence[str]) -> dict[str, list[Entry]]:
        """Return the copies of each key's features that are not known to be damaged."""
        found = {
            key: [entry for entry in entries if entry not in self._damaged]
            for key, entries in self._index.find(keys).items()
        }
        return {key: entries for key, entries in found.items() if entries}

    def _read(self, places: dict[str, list[Entry]]) -> tuple[dict[str, bytes], list[str]]:
        """Read one whole copy of each key's features.

        Returns them, and the keys of which no copy is there.
        """
        found: dict[str, bytes] = {}
        gone: set[str] = set()
        left = {key: list(entries) for key, entries in places.items()}
        while asked := [(key, entries.pop(0)) for key, entries in left.items() if entries]:
            ranges = [Range(f"{e.shard}.bin", e.offset, e.length) for _, e in asked]
            data: bytes | OSError
            for (key, entry), data in zip(asked, self._folder.read_ranges(ranges), strict=True):
                whole = (
                    not isinstance(data, OSError)
                    and len(data) == entry.length
                    and zlib.crc32(data) == entry.crc32
                )
                if whole and not isinstance(data, OSError):
                    found[key] = data
                    del left[key]
                    continue
                if isinstance(data, OSError):
                    gone.add(key)
                # A storage that does not answer says nothing about the features.
                if not isinstance(data, OSError) or isinstance(data, FileNotFoundError):
                    with self._lock:
                        self._damaged.add(entry)
        return found, [key for key in left if key in gone]

    # -- writing -------------------------------------------------------------------------------

    def put(self, items: Mapping[str, bytes]) -> None:
        """Add features; a thread writes a shard once enough are pending or the oldest are old."""
        if self.full:
            return
        with self._lock:
            for key in self.absent(list(items)):
                self._pending[key] = items[key]
                self._pending_bytes += len(items[key])
            now = time.monotonic()
            age = max(self.flush_seconds, min(_LONGEST_AGE, _AGE_SHARE * (now - self._began)))
            room = None if self.limit_bytes is None else self.limit_bytes - self.stored_bytes
            enough = self._pending_bytes >= self.flush_bytes or now - self._flushed_at >= age
            if not enough and (room is None or self._pending_bytes <= room):
                return
            writing = self._writer is not None and self._writer.is_alive()
            if writing and self._pending_bytes < 2 * self.flush_bytes:
                return
        self._join_writer()
        self._writer = threading.Thread(target=self._write_pending, name="feature cache")
        self._writer.start()

    def flush(self, strict: bool = False) -> None:
        """Write the pending features as one shard, or set `full` to the reason they are not kept.

        While storage is unavailable they stay in memory up to a limit, and the next flush tries
        again. strict: raise OSError instead.
        """
        self._join_writer()
        error = self._write_pending()
        if strict and error is not None:
            raise error

    def _join_writer(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write_pending(self) -> OSError | None:
        """Write what is pending as one shard; return the error after which it is still pending."""
        with self._lock:
            self._flushed_at = time.monotonic()
            if self.limit_bytes is not None and self._pending:
                self._index.refresh()
                room = self.limit_bytes - self.stored_bytes
                self._pending = self._within(self._pending, room)
            items, self._writing = self._pending, self._pending
            self._pending, self._pending_bytes = {}, 0
        if not items:
            return None
        shard, rows, size = uuid.uuid4().hex, [], 0
        for key, data in items.items():
            rows.append(Row(key, size, len(data), zlib.crc32(data)))
            size += len(data)
        table = KeyTable.of_shard(shard, size, rows)
        failed: OSError | None = None
        try:
            self._folder.write(f"{shard}.bin", b"".join(items.values()))
            self._index.write(shard, table)
        except OSError as error:
            failed = error
        with self._lock:
            self._writing = {}
            if failed is None:
                self._index.add(shard, table)
            elif failed.errno in NO_SPACE or size > _MOST_WAITING * self.flush_bytes:
                self.full = f"{self._folder.location}: {failed.strerror or failed}"
                self._pending, self._pending_bytes = {}, 0
                return None
            else:
                self._pending = {**items, **self._pending}
                self._pending_bytes = sum(map(len, self._pending.values()))
        return failed

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


def advice_when_full(format: str) -> str:
    """Return the settings that make room in a full cache, for messages."""
    return "raise data.cache_gb" + (
        ", or halve the features with encoder.format int8" if format == "exact" else ""
    )
