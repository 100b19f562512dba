"""The feature cache: what was put in comes out whole, or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pytest

from omni.storage.digest import digest
from omni.storage.flat_folder import _OPEN_FILES, LocalFolder
from omni.stream.feature_cache import FeatureCache


def _items(first: int, last: int) -> dict[str, bytes]:
    return {f"key-{n}": f"features of {n} ".encode() * (n + 1) for n in range(first, last)}


def _table(shard: Path) -> Path:
    """The table of a shard's keys."""
    return shard.parent / "keys" / f"{shard.stem}.keys"


def write_old(folder: Path, shard: str, items: dict[str, bytes], known: bool = True) -> Path:
    """Write a shard as version 0.1 did; `known`: with a digest of its rows, as later ones did."""
    rows, offset = [], 0
    for key, data in items.items():
        rows.append((key, offset, len(data), zlib.crc32(data)))
        offset += len(data)
    types = [pa.string(), pa.int64(), pa.int64(), pa.uint32()]
    arrays = [pa.array(c, t) for c, t in zip(zip(*rows, strict=True), types, strict=True)]
    metadata = {"digest": digest(repr(rows), size=16)} if known else None
    table = pa.table(arrays, names=["key", "offset", "length", "crc32"], metadata=metadata)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{shard}.bin").write_bytes(b"".join(items.values()))
    path = folder / f"{shard}.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def _written(folder: Path, items: dict[str, bytes]) -> Path:
    """Write items as one shard; returns its data file."""
    before = set(folder.glob("*.bin"))
    cache = FeatureCache(folder)
    cache.put(items)
    cache.flush()
    [shard] = set(folder.glob("*.bin")) - before
    return shard


def test_what_one_instance_wrote_another_reads(tmp_path: Path) -> None:
    items = _items(0, 20)
    _written(tmp_path / "cache", items)
    reader = FeatureCache(tmp_path / "cache")
    assert len(reader) == 20
    assert reader.get(items) == items
    assert reader.get(["key-3", "unknown", "key-3"]) == {"key-3": items["key-3"]}


def test_an_empty_or_missing_folder_holds_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "nowhere")
    assert cache.get(["key-0"]) == {} and len(cache) == 0
    cache.flush()
    assert not (tmp_path / "nowhere").exists(), "nothing gathered, nothing written"


def test_features_are_served_before_they_are_on_disk(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, flush_bytes=1 << 30, flush_seconds=3600)
    cache.put(_items(0, 3))
    assert cache.get(["key-1"]) == _items(1, 2) and len(cache) == 3
    assert list(tmp_path.iterdir()) == []
    assert FeatureCache(tmp_path).get(["key-1"]) == {}


@pytest.mark.parametrize("limits", [{"flush_bytes": 60}, {"flush_seconds": 0.0}])
def test_enough_or_old_features_become_a_shard(tmp_path: Path, limits: dict[str, int]) -> None:
    """A thread writes it, and they are served meanwhile."""
    cache = FeatureCache(tmp_path, **{"flush_bytes": 1 << 30, "flush_seconds": 3600, **limits})
    cache.put({"key": bytes(100)})
    assert cache.get(["key"]) == {"key": bytes(100)} and len(cache) == 1
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("keys/*.keys")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert FeatureCache(tmp_path).get(["key"]) == {"key": bytes(100)}
    assert cache.get(["key"]) == {"key": bytes(100)} and len(cache) == 1


def test_the_age_at_which_features_are_written_grows_with_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("omni.stream.feature_cache.time.monotonic", lambda: now)
    cache, written = FeatureCache(tmp_path), []
    for second in range(0, 9_000, 5):
        now = 1000.0 + second
        cache.put({f"key-{second}": b"x"})
        cache._join_writer()
        if not cache._pending:
            written.append(second)
    waits = [later - earlier for earlier, later in zip(written, written[1:], strict=False)]
    assert waits[0] == 5 and max(waits) == 300
    assert len(written) < 150, "a shard each 5 s would make 1,800"


def test_a_reader_sees_what_others_finish_later(tmp_path: Path) -> None:
    reader = FeatureCache(tmp_path / "cache")
    for first in (0, 5, 10):
        _written(tmp_path / "cache", _items(first, first + 5))
        assert reader.get(_items(0, 15)) == _items(0, first + 5)
    assert FeatureCache(tmp_path / "cache").get(["key-12"]) == _items(12, 13)


def test_what_is_known_is_not_written_twice(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        cache.put(_items(0, 5))
        cache.flush()
    assert len(list(tmp_path.glob("*.bin"))) == 1 and len(cache) == 5


def test_two_writers_of_the_same_features_do_no_harm(tmp_path: Path) -> None:
    one, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    for cache in (one, other):
        cache.put(_items(0, 5))
    one.flush()
    other.flush()
    reader = FeatureCache(tmp_path)
    assert reader.get(_items(0, 5)) == _items(0, 5) and len(reader) == 5


def test_features_may_be_empty(tmp_path: Path) -> None:
    _written(tmp_path, {"nothing": b"", "something": b"x"})
    assert FeatureCache(tmp_path).get(["nothing"]) == {"nothing": b""}


# -- damage ------------------------------------------------------------------------------------


def test_features_beyond_a_truncation_are_absent(tmp_path: Path) -> None:
    items = _items(0, 10)
    shard = _written(tmp_path, items)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert FeatureCache(tmp_path).get(items) == _items(0, 9)


def test_features_with_a_flipped_byte_are_absent(tmp_path: Path) -> None:
    items = _items(0, 10)
    shard = _written(tmp_path, items)
    data = bytearray(shard.read_bytes())
    data[len(items["key-0"])] ^= 1  # the first of key-1
    shard.write_bytes(data)
    cache = FeatureCache(tmp_path)
    assert cache.get(items) == {**_items(0, 1), **_items(2, 10)}
    assert len(cache) == 9
    cache.put(_items(1, 2))
    assert cache.get(items) == items, "what was damaged can be put in again"


def test_features_whose_data_is_gone_are_absent(tmp_path: Path) -> None:
    _written(tmp_path, _items(0, 5)).unlink()
    _written(tmp_path, _items(5, 10))
    assert FeatureCache(tmp_path).get(_items(0, 10)) == _items(5, 10)


def test_a_writer_killed_between_data_and_table_leaves_nothing(tmp_path: Path) -> None:
    shard = _written(tmp_path, _items(0, 5))
    _table(shard).unlink()
    cache = FeatureCache(tmp_path)
    assert len(cache) == 0 and cache.get(["key-1"]) == {}
    cache.put(_items(0, 5))
    cache.flush()
    assert FeatureCache(tmp_path).get(_items(0, 5)) == _items(0, 5)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"garbage", lambda b: b[:-1], lambda b: b[: len(b) // 2]],
)
def test_a_damaged_table_is_ignored(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    table = _table(_written(tmp_path, _items(0, 5)))
    table.write_bytes(damage(table.read_bytes()))
    old = write_old(tmp_path, "old", _items(10, 15))
    old.write_bytes(damage(old.read_bytes()))
    (tmp_path / "keys" / "complete").unlink()
    _written(tmp_path, _items(5, 10))
    (tmp_path / "notes.txt").write_text("not of this cache")
    assert FeatureCache(tmp_path).get(_items(0, 15)) == _items(5, 10)


@pytest.mark.parametrize("old", [True, False], ids=["version 0.1", "now"])
def test_a_table_with_a_flipped_byte_is_ignored(tmp_path: Path, old: bool) -> None:
    items = {"key": bytes(0x1234)}
    table = write_old(tmp_path, "a", items) if old else _table(_written(tmp_path, items))
    assert FeatureCache(tmp_path).get(["key"]) == items
    data = table.read_bytes()
    length = (0x1234).to_bytes(8, "little")
    assert data.count(length) == 1 + (not old), "once in the row, and as the size of the shard"
    table.write_bytes(data.replace(length, length[:6] + b"\x01" + length[7:], 1))
    assert FeatureCache(tmp_path).get(["key"]) == {}


_READ_FLIPPED = """
import hashlib, sys
from pathlib import Path
from omni.stream.feature_cache import FeatureCache
from tests.stream.test_feature_cache import write_old
folder = Path(sys.argv[1])
items = {hashlib.md5(bytes([n])).hexdigest(): bytes([n]) * 50 for n in range(5)}
if sys.argv[2] == "now":
    cache = FeatureCache(folder)
    cache.put(items)
    cache.flush()
    [table] = folder.glob("keys/*.keys")
else:
    table = write_old(folder, "a", items)
whole = table.read_bytes()
assert FeatureCache(folder).get(items) == items
for place in range(0, len(whole), 1 if sys.argv[2] == "now" else 5):
    table.unlink()
    table.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    found = FeatureCache(folder).get(items)
    assert all(items[key] == data for key, data in found.items()), place
print("done")
"""


@pytest.mark.parametrize("version", ["0.1", "now"])
def test_no_flipped_byte_of_a_table_ends_the_process(tmp_path: Path, version: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _READ_FLIPPED, str(tmp_path), version],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_damaged_copy_does_not_hide_a_whole_one(tmp_path: Path) -> None:
    caches = [FeatureCache(tmp_path) for _ in range(7)]
    for cache in caches:
        cache.put(_items(0, 1))
        cache.flush()
    shards = list(tmp_path.glob("*.bin"))
    assert len(shards) == 7
    for shard in shards:
        shard.write_bytes(bytes(shard.stat().st_size))
    repaired = FeatureCache(tmp_path)
    assert repaired.get(["key-0"]) == {}
    repaired.put(_items(0, 1))
    repaired.flush()
    assert FeatureCache(tmp_path).get(_items(0, 1)) == _items(0, 1)


# -- many shards, many processes ---------------------------------------------------------------

_READ_MANY = """
import resource, sys
from pathlib import Path
from omni.stream.feature_cache import FeatureCache
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
cache = FeatureCache(Path(sys.argv[1]))
keys = [f"key-{n}" for n in range(int(sys.argv[3]))]
for _ in range(2):
    found = cache.get(keys)
    assert len(found) == len(keys), f"{len(found)} of {len(keys)}"
"""


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    shards = 3 * _OPEN_FILES
    cache = FeatureCache(tmp_path, flush_bytes=0)
    for number in range(shards):
        cache.put(_items(number, number + 1))
        cache.flush()
    assert len(list(tmp_path.glob("*.bin"))) == shards
    limit = _OPEN_FILES + 24
    arguments = [str(tmp_path), str(limit), str(shards)]
    subprocess.run([sys.executable, "-c", _READ_MANY, *arguments], check=True)
    assert FeatureCache(tmp_path).get(_items(0, shards)) == _items(0, shards)


_WRITE = """
import sys
from pathlib import Path
from omni.stream.feature_cache import FeatureCache
cache = FeatureCache(Path(sys.argv[1]), flush_bytes=2_000)
print("ready", flush=True)
sys.stdin.readline()
for n in range(int(sys.argv[2]), int(sys.argv[3])):
    cache.put({f"key-{n}": f"features of {n} ".encode() * (n + 1)})
    cache.get([f"key-{n - 1}", f"key-{n - 60}", f"key-{n + 60}"])
cache.flush()
"""


def test_processes_write_beside_each_other(tmp_path: Path) -> None:
    """Two writers whose keys overlap, let go at the same moment."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITE, str(tmp_path / "cache"), str(first), str(first + 80)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for first in (0, 60)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert len(list((tmp_path / "cache").glob("*.bin"))) > 4
    assert FeatureCache(tmp_path / "cache").get(_items(0, 140)) == _items(0, 140)


_WRITE_ON = """
import itertools, sys
from pathlib import Path
from omni.stream.feature_cache import FeatureCache
cache = FeatureCache(Path(sys.argv[1]), flush_bytes=2_000)
for n in itertools.count():
    cache.put({f"key-{n}": f"features of {n} ".encode() * (n % 50 + 1)})
"""


def test_a_killed_writer_loses_its_last_shard_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    writer = subprocess.Popen([sys.executable, "-c", _WRITE_ON, str(folder)])
    deadline = time.monotonic() + 60
    while len(list(folder.glob("keys/*.keys"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    tables, shards = list(folder.glob("keys/*.keys")), list(folder.glob("*.bin"))
    assert len(tables) >= 5 and len(shards) - len(tables) in (0, 1)
    cache = FeatureCache(folder)
    kept = len(cache)
    expected = {f"key-{n}": f"features of {n} ".encode() * (n % 50 + 1) for n in range(kept)}
    assert cache.get(expected) == expected, "all features up to the last shard"
    cache.put({f"key-{kept}": b"again"})
    cache.flush()
    assert FeatureCache(folder).get([f"key-{kept}"]) == {f"key-{kept}": b"again"}


# -- limits ------------------------------------------------------------------------------------


def test_the_limit_holds_and_is_told(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, limit_bytes=2_500, flush_bytes=1_000)
    for n in range(5):
        cache.put({f"key-{n}": bytes([n]) * 1_000})
    cache.flush()
    assert cache.full is not None
    assert str(tmp_path) in cache.full and "2.5e-06 GB" in cache.full
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == 2_000
    assert cache.get(["key-0", "key-1", "key-4"]).keys() == {"key-0", "key-1"}
    assert FeatureCache(tmp_path, limit_bytes=2_500).full is None, "there is no word on disk"


def test_what_others_wrote_counts(tmp_path: Path) -> None:
    _written(tmp_path, {"key": bytes(2_000)})
    cache = FeatureCache(tmp_path, limit_bytes=2_500)
    _written(tmp_path, {"other": bytes(400)})
    cache.put({"big": bytes(101)})
    cache.flush()
    assert cache.full is not None
    roomy = FeatureCache(tmp_path, limit_bytes=2_501)
    roomy.put({"big": bytes(101)})
    roomy.flush()
    assert roomy.full is None and roomy.get(["big"]) == {"big": bytes(101)}


_FILL_DISK = """
import resource, signal, sys
from pathlib import Path
from omni.stream.feature_cache import FeatureCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
cache = FeatureCache(Path(sys.argv[1]), flush_bytes=0)
cache.put({"small": bytes(1_000)})
cache.flush()
assert cache.full is None
cache.put({"large": bytes(6_000)})
cache.flush()
print(cache.full)
cache.put({"more": bytes(10)})
"""


def test_a_disk_that_takes_no_more_is_a_full_cache(tmp_path: Path) -> None:
    """The kernel refuses the write; what lay there before stays, and no rest is left."""
    done = subprocess.run(
        [sys.executable, "-c", _FILL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and "File too large" in done.stdout
    assert len(FeatureCache(tmp_path)) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ""}


@pytest.mark.parametrize("known", [True, False], ids=["with a digest", "of version 0.1"])
def test_a_table_whose_keys_are_mixed_up_gives_nobody_anothers_features(
    tmp_path: Path, known: bool
) -> None:
    """A damaged key may be that of another recording; old tables have no digest."""
    items = _items(0, 2)
    path = write_old(tmp_path, "a", items, known)
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    mixed = table.set_column(0, "key", pa.array(table["key"].to_pylist()[::-1]))
    mixed = mixed.replace_schema_metadata(table.schema.metadata)
    with pa.ipc.new_file(str(path), mixed.schema) as writer:
        writer.write_table(mixed)
    found = FeatureCache(tmp_path).get(items)
    assert found == ({} if known else dict(zip(items, list(items.values())[::-1], strict=True)))


# -- folders of version 0.1 --------------------------------------------------------------------


def test_a_folder_of_version_0_1_is_read_and_added_to(tmp_path: Path) -> None:
    for shard in range(3):
        write_old(tmp_path, f"shard{shard}", _items(5 * shard, 5 * shard + 5), known=shard > 0)
    for _ in range(2):
        cache = FeatureCache(tmp_path)
        assert cache.get(_items(0, 15)) == _items(0, 15) and len(cache) >= 15
        assert cache.stored_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.bin"))
        cache.put(_items(15, 20))
        cache.flush()
    assert FeatureCache(tmp_path).get(_items(0, 20)) == _items(0, 20)
    assert len(list(tmp_path.glob("*.bin"))) == 4
    assert not (tmp_path / "keys" / "complete").exists()


def test_features_that_storage_does_not_deliver_once_are_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = _items(0, 3)
    _written(tmp_path, items)
    reader = FeatureCache(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(LocalFolder, "read", _no_answer)
        assert reader.get(items) == {}
        assert reader.absent(list(items)) == []
    reader.put(items)  # They have been encoded meanwhile.
    reader.flush()
    assert reader.get(items) == items and len(list(tmp_path.glob("*.bin"))) == 1


def _no_answer(self: LocalFolder, name: str, offset: int = 0, length: int | None = None) -> bytes:
    if length is None:
        return (self.path / name).read_bytes()
    raise OSError(errno.ETIMEDOUT, "Connection timed out")
