"""Keys depend on all bytes; measurements and keys of older versions stay where they are right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from omni.corpus import lengths
from omni.corpus.index import Index, build_index
from omni.corpus.lengths import measure_data
from omni.errors import LocatedError

Manifest = Callable[..., str]
EDGE = 64 * 1024


def key_of_before(data: bytes, start: float = 0.0, duration: float | None = None) -> str:
    """Hash as version 1 did: size, span, and both ends."""
    state = hashlib.blake2b(f"{len(data)} {start} {duration}".encode(), digest_size=16)
    last = max(EDGE, len(data) - EDGE)
    state.update(data[: min(EDGE, len(data))])
    state.update(data[last:] if len(data) > last else b"")
    return state.hexdigest()


def _write(path: Path, middle: int) -> bytes:
    """Write 12 s: the same noise at both ends, and another in the middle."""
    ends, rng = np.random.default_rng(7), np.random.default_rng(middle)
    head, tail = ends.uniform(-0.5, 0.5, (2, 64_000))
    soundfile.write(path, np.concatenate((head, rng.uniform(-0.5, 0.5, 64_000), tail)), 16_000)
    return path.read_bytes()


@pytest.fixture
def alike(tmp_path: Path, manifest: Manifest) -> tuple[str, dict[str, bytes]]:
    """Three recordings of the same size with the same ends; two have the same middle."""
    data = {name: _write(tmp_path / name, n) for name, n in (("a.wav", 0), ("b.wav", 1))}
    data["c.wav"] = _write(tmp_path / "c.wav", 0)
    return manifest(*({"audio": name, "text": name} for name in data)), data


def _keys(index: Index) -> list[str]:
    found: list[str] = index.table["key"].to_pylist()
    return found


def test_recordings_with_the_same_ends_have_keys_of_their_own(
    alike: tuple[str, dict[str, bytes]],
) -> None:
    spec, data = alike
    before = [key_of_before(found) for found in data.values()]
    assert len(set(before)) == 1, "they had one key, and one's features"
    a, b, c = _keys(build_index([spec]))
    assert a == c != b
    assert [measure_data(found, 0.0, None)["key"] for found in data.values()] == [a, b, c]


def test_small_recordings_have_the_keys_of_before(tmp_path: Path, manifest: Manifest) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 64_000)
    soundfile.write(tmp_path / "small.wav", noise, 16_000)
    data = (tmp_path / "small.wav").read_bytes()
    assert EDGE < len(data) <= 2 * EDGE
    rows = ({"audio": "small.wav", "text": "a"},
            {"audio": "small.wav", "text": "b", "offset": 0.5, "duration": 1})  # fmt: skip
    assert _keys(build_index([manifest(*rows)])) == [
        key_of_before(data),
        key_of_before(data, 0.5, 1.0),
    ]


def test_the_spans_of_a_long_recording_hash_its_middle_once(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "long.wav", 0)
    made = []
    middle = lengths.middle_hash
    monkeypatch.setattr(lengths, "middle_hash", lambda *a: made.append(1) or middle(*a))
    rows = [{"audio": "long.wav", "text": "a", "offset": n, "duration": 1} for n in range(10)]
    assert len(set(_keys(build_index([manifest(*rows)])))) == 10
    assert len(made) == 1


def _as_before(kept: Path, data: dict[str, bytes]) -> None:
    """Turn a file of measurements into one of version 1."""
    table = pq.read_table(kept).to_pylist()
    for row in table:
        del row["complete"]
        row["key"] = key_of_before(next(d for name, d in data.items() if name in row["file"]))
    pq.write_table(pa.Table.from_pylist(table), kept)


def test_measurements_of_before_keep_their_keys_except_for_namesakes(
    alike: tuple[str, dict[str, bytes]], tmp_path: Path, manifest: Manifest
) -> None:
    spec, data = alike
    cache = tmp_path / "cache"
    a, b, _ = _keys(build_index([spec], cache_dir=cache))
    [kept] = cache.glob("*.parquet")
    _as_before(kept, data)
    assert _keys(build_index([spec], cache_dir=cache)) == [a, b, a], "one key, two contents"
    assert _keys(build_index([spec], cache_dir=cache)) == [a, b, a]

    twins = manifest(
        *({"audio": name, "text": name} for name in ("a.wav", "c.wav")), name="t.jsonl"
    )
    own = tmp_path / "twins"
    build_index([twins], cache_dir=own)
    [kept] = own.glob("*.parquet")
    _as_before(kept, data)
    old = key_of_before(data["a.wav"])
    for _ in range(2):
        assert _keys(build_index([twins], cache_dir=own)) == [old, old], "their features are there"


def test_an_unexpected_error_names_the_row(
    alike: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = alike

    def fails(*_: object) -> str:
        raise ZeroDivisionError("of the test\nmore")

    monkeypatch.setattr(lengths, "_content_key", fails)
    with pytest.raises(LocatedError, match=r"^\S+ \(.*a\.wav\): ZeroDivisionError: of the test$"):
        build_index([spec])


def test_a_decoder_that_raises_anything_costs_one_recording(
    alike: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = alike
    opened = soundfile.SoundFile.__init__

    def opens(self: object, file: object, *more: object, **named: object) -> None:
        if str(file).endswith("b.wav"):
            raise ValueError("array is too big")
        opened(self, file, *more, **named)

    monkeypatch.setattr(soundfile.SoundFile, "__init__", opens)
    index = build_index([spec])
    assert len(index) == 2
    [reject] = index.rejects
    assert reject.reason == "unreadable"
    assert "b.wav" in reject.detail and "ValueError: array is too big" in reject.detail
