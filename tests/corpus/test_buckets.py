"""Corpora in object storage, on a real S3 server on loopback."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import soundfile

from omni.audio import recording as audio
from omni.audio.decode import AudioError, AudioSpan, decode, decode_blocks, measure
from omni.corpus.index import build_index
from omni.corpus.manifest import ManifestError
from omni.corpus.sources import Options, open_source
from omni.storage.byte_range import ObjectRange
from omni.storage.path import ObjectPath, as_path
from tests.corpus.test_sources import (
    SHAPES,
    Expected,
    Rows,
    audio_of,
    expected,
    folder,
    index,
    rows,
    same,
)
from tests.helpers.loopback_s3 import s3_bucket

__all__ = ["expected", "folder", "rows"]  # fixtures
LOCAL = {"hf saved", "hf parquet", "hf audiofolder"}  # `datasets` reads them, from folders
FAST = {"jsonl", "parquet bytes", "webdataset", "folder"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("corpora") as uri:
        yield uri


@pytest.fixture
def there(bucket: str, tmp_path: Path) -> ObjectPath:
    found = as_path(bucket) / tmp_path.name
    assert isinstance(found, ObjectPath)
    return found


def upload(source: Path, to: ObjectPath, moved: dict[Path, ObjectPath] | None = None) -> None:
    """Copy a folder; text in it that names one of the folders `moved` names its new place then."""
    filesystem, key = to.filesystem
    pafs.copy_files(str(source), key, destination_filesystem=filesystem)
    for file in source.rglob("*"):
        if moved and file.is_file() and file.suffix in (".jsonl", ".csv", ".tsv", ".scp", ".gz"):
            packed = file.suffix == ".gz"
            data = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
            for old, new in moved.items():
                data = data.replace(str(old).encode(), str(new).encode())
            name = file.relative_to(source).as_posix()
            (to / name).write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=[] if shape in FAST else pytest.mark.slow)
        for shape in SHAPES
        if shape not in LOCAL and shape != "parquet manifest"
    ],
)
def test_every_shape_may_lie_in_a_bucket(
    shape: str, folder: Path, rows: Rows, expected: Expected, there: ObjectPath, tmp_path: Path
) -> None:
    write, bytes_too, speakers = SHAPES[shape]
    (tmp_path / "in").mkdir()
    spec = write(folder, rows, tmp_path / "in")
    moved = {folder: there / "corpus", tmp_path / "in": there / "in"}
    for local, remote in moved.items():
        upload(local, remote, moved)
        spec = spec.replace(str(local), str(remote))
    found = index(there / "out", spec, allow_absolute=True)
    same(found, expected.index, bytes_too, speakers)
    assert all(row["uri"].startswith(str(there)) for row in found.table.to_pylist())
    for one, other in zip(audio_of(found), expected.audio, strict=True):
        assert np.array_equal(one, other)


def test_a_manifest_in_a_bucket_is_trained_on_as_it_is(
    folder: Path, expected: Expected, there: ObjectPath, tmp_path: Path
) -> None:
    upload(folder, there)
    found = build_index([(there / "corpus.jsonl").uri], cache_dir=there / "cache")
    same(found, expected.index, True, True)
    assert "secret" not in str(found.table.to_pylist())
    assert [path.suffix for path in (there / "cache").iterdir()] == [".parquet"]
    again = build_index([(there / "corpus.jsonl").uri], cache_dir=there / "cache")
    assert again.table.equals(found.table)


def test_a_manifest_names_what_lies_beside_it(there: ObjectPath, folder: Path) -> None:
    upload(folder, there / "corpus")
    manifest = there / "corpus" / "corpus.jsonl"
    line = '{"id": "a", "audio": "NAME", "text": "hello"}\n'
    inside = str(there / "corpus" / "clips" / "0000.flac")
    for name in ("/etc/passwd", "../other/a.flac", str(there / "other" / "a.flac")):
        manifest.write_text(line.replace("NAME", name))
        with pytest.raises(ManifestError, match="outside"):
            build_index([manifest.uri])
    for name in (inside, "clips/0000.flac", "clips/../clips/0000.flac"):
        manifest.write_text(line.replace("NAME", name))
        assert build_index([manifest.uri]).table["uri"].to_pylist() == [inside]


def test_what_is_not_there_is_left_out_and_what_does_not_answer_is_an_error(
    folder: Path, there: ObjectPath
) -> None:
    upload(folder, there)
    (there / "clips" / "0003.flac").unlink()
    (there / "clips" / "0004.flac").write_bytes(b"no sound")
    found = build_index([(there / "corpus.jsonl").uri])
    assert {r.id: r.reason for r in found.rejects} == {"u0003": "missing", "u0004": "unreadable"}
    with pytest.raises(AudioError, match=r"^missing: .*clips/0003\.flac"):
        decode(str(there / "clips" / "0003.flac"))
    with pytest.raises(ManifestError, match=r"nothing\.jsonl"):
        build_index([(there / "nothing.jsonl").uri])
    with pytest.raises(ManifestError, match="nonsense://"):
        build_index(["nonsense://key:secret@bucket/corpus.jsonl"])
    away = "s3://away/x.jsonl?endpoint_override=127.0.0.1:9&scheme=http&region=r"
    with pytest.raises(OSError):
        build_index([away])
    with pytest.raises(OSError):
        decode("s3://away/x.flac")


def test_a_span_of_a_long_recording_is_read_where_it_lies(
    there: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 16_000
    noise = np.random.default_rng(0).normal(0, 0.1, 600 * rate)
    local, far = tmp_path / "long.wav", there / "long.wav"
    soundfile.write(local, noise, rate, subtype="PCM_16")
    far.upload(local)
    assert local.stat().st_size > 4 * audio.MAX_WHOLE
    read: list[int] = []
    fetch = ObjectRange._fetch

    def counted(self: ObjectRange, count: int, at: int) -> bytes:
        data = fetch(self, count, at)
        read.append(len(data))
        return data

    monkeypatch.setattr(ObjectRange, "_fetch", counted)
    span = AudioSpan(500.0, 2.0)
    assert measure(far, span) == 2 * rate
    assert np.array_equal(decode(str(far), span), decode(local, span))
    assert sum(read) < local.stat().st_size / 10
    whole = np.concatenate(list(decode_blocks(str(far))))
    assert np.array_equal(whole, decode(local))


def test_storage_that_goes_away_in_the_middle_is_no_bad_recording(
    there: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, far = tmp_path / "long.wav", there / "long.wav"
    soundfile.write(local, np.zeros(300 * 16_000), 16_000)
    far.upload(local)
    calls = iter(range(100))
    ranges = ObjectPath.ranges

    class Cut:
        """The real file, whose server is gone after some requests."""

        def __init__(self, file: object) -> None:
            self._file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def read_at(self, count: int, at: int) -> bytes:
            if next(calls) > 5:
                raise OSError("the server is gone")
            return self._file.read_at(count, at)  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(ObjectPath, "ranges", lambda self: Cut(ranges(self)))
    with pytest.raises(OSError, match="the server is gone"):
        decode(str(far))


def test_patterns_and_folders_find_their_files(there: ObjectPath) -> None:
    for name in ("a/1.tar", "a/2.tar", "a/b/3.tar", "a/note.txt"):
        (there / name).write_bytes(b"")
    for spec, wanted in (
        (f"wds:{there}/a", ["1.tar", "2.tar", "3.tar"]),
        (f"wds:{there}/a/*.tar", ["1.tar", "2.tar"]),
        (f"{there}/a/2.tar", ["2.tar"]),
    ):
        source = open_source(spec, Options())
        assert [path.name for path in source.paths.values()] == wanted  # type: ignore[attr-defined]
    with pytest.raises(ManifestError, match=r"/c/\*\.tar"):
        open_source(f"wds:{there}/c/*.tar", Options())
