"""A compacted cache holds what it held, in fewer files, whoever reads and writes meanwhile."""

from __future__ import annotations

import errno
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.storage.digest import digest
from omni.storage.path import join
from omni.stream import compaction, key_table
from omni.stream.compaction import compact
from omni.stream.feature_cache import FeatureCache
from omni.stream.key_table import KeyTable, Row, halves, merge, parse, to_bytes, write_merged
from tests.helpers.loopback_s3 import s3_bucket
from tests.stream.test_feature_cache import write_old


def _items(first: int, last: int) -> dict[str, bytes]:
    return {f"key-{n}": f"features of {n} ".encode() * (n + 1) for n in range(first, last)}


def _fill(location: str | Path, shards: int, each: int = 5) -> dict[str, bytes]:
    cache = FeatureCache(location)
    for shard in range(shards):
        cache.put(_items(each * shard, each * shard + each))
        cache.flush()
    return _items(0, shards * each)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("compaction") as uri:
        yield uri


@pytest.fixture(params=["disk", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "cache")
    return join(request.getfixturevalue("bucket"), uuid.uuid4().hex)


def test_many_shards_become_one_under_the_hands_of_a_reader(location: str) -> None:
    items = _fill(location, 3)
    reader = FeatureCache(location)
    assert reader.get(["key-3"]) == _items(3, 4)
    done = compact(location)
    assert done is not None
    assert (done.shards, done.shards_after, done.tables, done.keys) == (3, 1, 3, 15)
    assert reader.get(items) == items, "its shards are gone, and it looks again"
    fresh = FeatureCache(location)
    assert fresh.get(items) == items and len(fresh) == 15
    assert fresh.stored_bytes == sum(map(len, items.values()))
    assert compact(location) is None
    fresh.put(_items(15, 20))
    fresh.flush()
    assert compact(location) is not None
    assert FeatureCache(location).get(_items(0, 20)) == _items(0, 20)


def test_folders_of_version_0_1_are_converted(tmp_path: Path) -> None:
    for shard in range(3):
        write_old(tmp_path, f"old{shard}", _items(5 * shard, 5 * shard + 5))
    cache = FeatureCache(tmp_path)
    cache.put(_items(15, 20))
    cache.flush()
    done = compact(tmp_path)
    assert done is not None and (done.shards_after, done.keys) == (1, 20)
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".bin", ""} and (tmp_path / "keys" / "complete").is_file()
    assert FeatureCache(tmp_path).get(_items(0, 20)) == _items(0, 20)


def test_copies_are_joined_and_damaged_ones_dropped(tmp_path: Path) -> None:
    caches = [FeatureCache(tmp_path) for _ in range(3)]
    shards: list[Path] = []
    for number, cache in enumerate(caches):
        cache.put(_items(number, 10))
        cache.flush()
        shards += set(tmp_path.glob("*.bin")) - set(shards)
    data = bytearray(shards[0].read_bytes())
    data[0] ^= 1  # the only copy of key-0
    data[-1] ^= 1  # one of three copies of key-9
    shards[0].write_bytes(data)
    done = compact(tmp_path)
    assert done is not None and (done.keys, done.damaged, done.shards_after) == (9, 2, 1)
    cache = FeatureCache(tmp_path)
    assert cache.get(_items(0, 10)) == _items(1, 10)
    assert cache.stored_bytes == sum(map(len, _items(1, 10).values()))


@pytest.mark.parametrize("deleted", range(6))
def test_a_killed_compaction_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    """It is killed before it deletes anything, or after some of it."""
    items = _fill(tmp_path, 3)
    left = deleted

    def delete(folder: compaction.LocalFolder, name: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        (folder.path / name).unlink()

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(compaction.LocalFolder, "delete", delete)
        compact(tmp_path)
    cache = FeatureCache(tmp_path)
    assert cache.get(items) == items and len(cache) == len(items)
    assert cache.stored_bytes == sum(map(len, items.values()))
    compact(tmp_path)
    assert FeatureCache(tmp_path).get(items) == items
    assert len(list(tmp_path.glob("keys/*.keys"))) == 1


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    items = _fill(tmp_path, 3)
    for name, age in (("old.bin", 2), ("new.bin", 0), (".old.tmp", 2)):
        (tmp_path / name).write_bytes(b"half a shard")
        moment = time.time() - age * 86_400
        os.utime(tmp_path / name, (moment, moment))
    done = compact(tmp_path)
    assert done is not None and done.removed == 2
    assert len(list(tmp_path.glob("*.bin"))) == 2 and (tmp_path / "new.bin").exists()
    assert FeatureCache(tmp_path).get(items) == items


def test_large_shards_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_SMALL_BYTES", 1_000)
    items = _fill(tmp_path, 6)
    large = {p.name for p in tmp_path.glob("*.bin") if p.stat().st_size > 1_000}
    assert 1 < len(large) < 5
    done = compact(tmp_path)
    assert done is not None and done.shards_after == len(large) + 1
    assert large < {path.name for path in tmp_path.glob("*.bin")}
    assert FeatureCache(tmp_path).get(items) == items


def test_only_so_much_is_copied(tmp_path: Path) -> None:
    items = _fill(tmp_path, 6)
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*.bin"))
    done = compact(tmp_path, most_bytes=sum(sizes[:3]))
    assert done is not None and done.shards_after == 4
    assert FeatureCache(tmp_path).get(items) == items


# -- tables ------------------------------------------------------------------------------------


def _table(shard: str, keys: list[str], first: int = 0) -> KeyTable:
    rows = [Row(key, 10 * (first + n), 10, zlib.crc32(key.encode())) for n, key in enumerate(keys)]
    return KeyTable.of_shard(shard, 10 * (first + len(keys)), rows)


def test_merged_tables_find_what_each_of_them_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several ranges, with keys in several tables, with keys that are equal in one half."""
    monkeypatch.setattr(key_table, "_RANGE_ROWS", 100)
    monkeypatch.setattr(key_table, "_KEYS_AT_ONCE", 70)
    keys = [f"{n % 300:016x}{n:016x}" for n in range(700)] + [f"{n:x}" for n in range(200)]
    parts = [keys[:400], keys[300:900], keys[100:150], []]
    tables = [_table(f"shard-{'x' * n}", part) for n, part in enumerate(parts)]
    path = tmp_path / "merged"
    with path.open("wb") as file:
        assert write_merged(file, tables, ["a", "b"]) == sum(map(len, parts))
    mapped, inside = KeyTable.map(path), merge(tables)
    assert mapped.replaces == ["a", "b"] and mapped.mapped and not inside.mapped
    for merged in (mapped, inside, parse(to_bytes(inside))):
        assert len(merged) == sum(map(len, parts))
        assert merged.stored_bytes == sum(table.stored_bytes for table in tables)
        for asked in (keys, keys[::-1], ["unknown", keys[5], f"{5:016x}{1:016x}"], []):
            high, low = halves(asked)
            expected = {place for table in tables for place in table.find(high, low)}
            assert set(merged.find(high, low)) == expected
            has = {number for number, _ in expected}
            assert set(np.flatnonzero(merged.contains(high, low)).tolist()) == has
    with path.open("wb") as file:
        count = write_merged(file, tables, [], without=["shard-"])
    assert count == sum(map(len, parts[1:]))
    only = KeyTable.map(path)
    found = {entry.shard for _, entry in only.find(*halves(keys))}
    assert found == {"shard-x", "shard-xx"} and b"shard-" not in only.names.tolist()


def test_a_record_that_is_damaged_is_absent() -> None:
    keys = [digest(str(n), size=16) for n in range(40)]
    raw = to_bytes(_table("shard", keys))
    expected = dict(parse(raw).find(*halves(keys)))
    assert len(expected) == 40
    rng, changed = np.random.default_rng(0), 0
    for _ in range(1000):
        data = bytearray(raw)
        data[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        try:
            found = parse(bytes(data)).find(*halves(keys))
        except ValueError:
            continue
        changed += len(found) < 40
        assert all(expected[number] == entry for number, entry in found)
    assert changed > 400


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = _fill(tmp_path, 3)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    scan = os.scandir
    for failing in (tmp_path, tmp_path / "keys"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="Stale"):
            patched.setattr(os, "scandir", lambda p, failing=failing: _stale(p, failing, scan))
            compact(tmp_path)
    after = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert {k: v for k, v in after.items() if k.name != ".lock"} == before
    assert compact(tmp_path) is not None and FeatureCache(tmp_path).get(items) == items


def _stale(path: Path, failing: Path, scan: Any) -> Any:
    if Path(path) == failing:
        raise OSError(errno.ESTALE, "Stale file handle")
    return scan(path)


def test_a_shard_that_a_writer_finishes_meanwhile_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = _fill(tmp_path, 3)
    unfinished = tmp_path / ".other.bin.1.tmp"
    unfinished.write_bytes(b"features")
    tables = compaction._Compaction._tables

    def finish(self: compaction._Compaction) -> Any:
        unfinished.rename(tmp_path / "other.bin")
        return tables(self)

    monkeypatch.setattr(compaction._Compaction, "_tables", finish)
    done = compact(tmp_path)
    assert done is not None and done.removed == 0 and FeatureCache(tmp_path).get(items) == items
    assert (tmp_path / "other.bin").read_bytes() == b"features"
