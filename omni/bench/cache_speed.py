"""Measure the feature cache: its index by the number of keys, and reads from where it lies."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from omni.bench.prepared_run import in_temporary_storage, progress
from omni.bench.process_alone import alone
from omni.bench.timing import Result, describe_machine, median
from omni.config import Config
from omni.errors import ConfigError, first_line
from omni.storage.digest import digest
from omni.storage.flat_folder import forget_copies, open_folder
from omni.storage.path import as_path, join, remove_tree
from omni.stream.feature_cache import FeatureCache
from omni.stream.key_index import COMPLETE, KEYS, KeyIndex
from omni.stream.key_table import KeyTable, write_merged

_SIZES = (1_000_000, 10_000_000, 30_000_000)
_READ = 1_000
"""Utterances that are read."""
_UTTERANCE_BYTES = 76_800
"""Features of two seconds: 100 frames of 384 in bf16."""
_SHARD_KEYS = (1 << 30) // _UTTERANCE_BYTES
"""Keys of a shard of 1 GiB."""
_WRITTEN_SHARD_BYTES = 4 << 20
_AT_ONCE = 64
_LOOK_UPS = 200
_ONE_BY_ONE = 200
"""Utterances of them that are read one at a time."""


def bench_cache(config: Config, sizes: Sequence[int] = _SIZES, reads: int = _READ) -> Result:
    """Run the `cache` suite: open indexes of these numbers of keys, find keys, read features.

    They are in a new folder of the run's feature cache, in a bucket or on disk, which is deleted at
    the end. The shards that the indexes name do not exist; those of the features that are read do.
    """
    result = Result("cache", describe_machine(torch.device("cpu"), 1))
    with _new_folder(config) as folder:
        result.notes.append(f"in {folder.partition('?')[0]}")
        for size in sorted(set(sizes)):
            location = join(folder, f"keys-{size}")
            progress(f"writing an index of {size:,} keys")
            try:
                shards = alone(write_index, location, size).value
            except OSError as error:
                raise ConfigError(f"data.cache: {first_line(error)}") from error
            first: _Opened = alone(open_index, location, size).value
            again: _Opened = alone(open_index, location, size).value
            name = f"{size:,} keys"
            result.add(name, first.seconds, "s", f"opened by a first process; {shards:,} shards")
            result.add(f"{name}, again", again.seconds, "s", "opened by another process")
            result.add(f"{name}, memory", again.megabytes, "MB", "of that process, for the index")
            result.add(f"{name}, {_AT_ONCE} of them", again.finding * 1e3, "ms", "to find")
            opening, finding = "Opening a cache, by keys", f"Finding {_AT_ONCE} keys, by keys"
            if "://" in location:
                result.add_point(opening, "s", "first on a node", size, first.seconds)
            result.add_point(opening, "s", "again", size, again.seconds)
            result.add_point(finding, "ms", "", size, again.finding * 1e3)
        progress(f"writing the features of {reads:,} utterances")
        alone(add_features, location, reads)
        progress("reading them: one at a time, and many")
        one, many = alone(_read, location, reads).value
        result.add("one at a time", 1 / one, "utterances/s", "one process")
        result.add("many at a time", 1 / many, "utterances/s", f"{_AT_ONCE} in a call")
        result.ratio["cache.reads_together"] = one / many
    return result


@contextlib.contextmanager
def _new_folder(config: Config) -> Iterator[str]:
    """Yield a new folder in the run's cache, or a temporary one where it has none; delete it."""
    with in_temporary_storage(config) as inside:
        folder = join(config.cache or inside.run.storage, f"bench-{uuid.uuid4().hex}")
        try:
            yield folder
        finally:
            for found in as_path(folder).glob("keys-*"):
                forget_copies(join(found, "keys"))
            remove_tree(as_path(folder))


def write_index(location: str, keys: int) -> int:
    """Write an index of that many keys, as a compaction leaves it, without its shards.

    Returns the number of shards that it names.
    """
    starts = range(0, keys, _SHARD_KEYS)
    tables = [_table(first, min(keys, first + _SHARD_KEYS)) for first in starts]
    folder = open_folder(join(location, "keys"))
    folder.write(COMPLETE, b"")
    spool = folder.spool()
    with spool.open("wb") as file:
        write_merged(file, tables, [])
    folder.upload(uuid.uuid4().hex + KEYS, spool)
    return len(tables)


def _table(first: int, last: int) -> KeyTable:
    """Make the table of a shard with the keys of the numbers from `first` to before `last`."""
    numbers = np.arange(first, last, dtype=np.uint64)
    return KeyTable.of_columns(
        f"shard-{first}",
        len(numbers) * _UTTERANCE_BYTES,
        _mixed(numbers),
        _mixed(numbers + np.uint64(1 << 32)),
        offset=(numbers - np.uint64(first)) * np.uint64(_UTTERANCE_BYTES),
        length=np.full(len(numbers), _UTTERANCE_BYTES),
        crc32=np.zeros(len(numbers), np.uint32),
    )


def _keys(numbers: np.ndarray) -> list[str]:
    high, low = _mixed(numbers), _mixed(numbers + np.uint64(1 << 32))
    return [f"{a:016x}{b:016x}" for a, b in zip(high.tolist(), low.tolist(), strict=True)]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Give each number other 64 bits that look random (SplitMix64, Steele et al. 2014)."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


@dataclass(frozen=True)
class _Opened:
    seconds: float
    megabytes: float
    """Growth of the resident memory, by opening the index and finding keys."""
    finding: float
    """Median seconds to find 64 keys."""


def open_index(location: str, size: int) -> _Opened:
    """Open the index of `size` keys, and find some of them."""
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    index = KeyIndex(location)
    opened = time.perf_counter() - began
    numbers = np.random.default_rng(0).integers(0, size, (_LOOK_UPS, _AT_ONCE), dtype=np.uint64)
    took = []
    for asked in map(_keys, numbers):
        began = time.perf_counter()
        found = index.find(asked)
        took.append(time.perf_counter() - began)
        assert len(found) == len(set(asked))
    return _Opened(opened, (process.memory_info().rss - before) / 1e6, median(took))


def feature_keys(reads: int) -> list[str]:
    """Name the utterances that `add_features` writes."""
    return [digest(f"utterance {number}", size=16) for number in range(reads)]


def add_features(location: str, reads: int) -> None:
    """Write the features of that many utterances."""
    # Small shards: servers for tests read a whole object to return a range of it.
    cache = FeatureCache(location, flush_bytes=_WRITTEN_SHARD_BYTES)
    generator = np.random.default_rng(1)
    for key in feature_keys(reads):
        cache.put({key: generator.bytes(_UTTERANCE_BYTES)})
    cache.flush(strict=True)


def _read(location: str, reads: int) -> tuple[float, float]:
    """Return the seconds for an utterance when they are read one at a time, and many at a time."""
    keys, seconds = feature_keys(reads), []
    for asked, together in ((keys[:_ONE_BY_ONE], 1), (keys, _AT_ONCE)):
        cache = FeatureCache(location)
        cache.get(asked[:1])  # Connects to the storage.
        began = time.perf_counter()
        for first in range(0, len(asked), together):
            part = asked[first : first + together]
            assert len(cache.get(part)) == len(part)
        seconds.append((time.perf_counter() - began) / len(asked))
    return seconds[0], seconds[1]
