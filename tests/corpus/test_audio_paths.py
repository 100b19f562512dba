"""What manifests may name: their own folder's recordings, by any words; nothing else unasked."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from jobs import index
from omni.audio.decode import decode
from omni.config import Config
from omni.corpus import lengths as measure
from omni.corpus.audio_paths import recording_uri
from omni.corpus.build_part import part_name
from omni.corpus.index import build_index
from omni.corpus.manifest import ManifestError
from omni.corpus.sources import Options, open_source
from omni.corpus.splits import build_indexes
from omni.storage import path as places
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import ObjectPath, StoragePath, as_path, literal_path
from omni.storage.uri import public_uri
from tests.helpers.loopback_s3 import s3_bucket

BUCKET, DISK = as_path("s3://bucket/corpus"), Path("/corpus")


@pytest.mark.parametrize(
    ("folder", "name", "uri"),
    [
        (DISK, "clips/a.wav", "/corpus/clips/a.wav"),
        (DISK, "clips/../a.wav", "/corpus/clips/../a.wav"),
        (DISK, "/corpus/a.wav", "/corpus/a.wav"),
        (DISK, "file:///corpus/a.wav", "/corpus/a.wav"),
        (BUCKET, "clips/a.wav", "s3://bucket/corpus/clips/a.wav"),
        (BUCKET, "clips/../a.wav", "s3://bucket/corpus/a.wav"),
        (BUCKET, "what? 50%@a#b.wav", "s3://bucket/corpus/what? 50%@a#b.wav"),
        (BUCKET, "s3://bucket/corpus/clips/a.wav", "s3://bucket/corpus/clips/a.wav"),
    ],
)
def test_what_lies_in_the_folder_may_be_named(folder: StoragePath, name: str, uri: str) -> None:
    assert recording_uri(folder, name, False) == uri == recording_uri(folder, name, True)


@pytest.mark.parametrize(
    ("folder", "name", "uri"),
    [
        (DISK, "../a.wav", "/corpus/../a.wav"),
        (DISK, "/other/a.wav", "/other/a.wav"),
        (DISK, "/corpus/../other/a.wav", "/corpus/../other/a.wav"),
        (DISK, "file:///corpus/../other/a.wav", "/other/a.wav"),
        (DISK, "s3://bucket/a.wav", "s3://bucket/a.wav"),
        (BUCKET, "../other/a.wav", "s3://bucket/other/a.wav"),
        (BUCKET, "s3://bucket/corpus/../other/a.wav", "s3://bucket/other/a.wav"),
        (BUCKET, "s3://bucket/corpus-2/a.wav", "s3://bucket/corpus-2/a.wav"),
        (BUCKET, "gs://elsewhere/corpus/a.wav", "gs://elsewhere/corpus/a.wav"),
        (BUCKET, "abfs://box@account.host/a.wav", "abfs://box@account.host/a.wav"),
    ],
)
def test_what_lies_elsewhere_has_to_be_admitted(folder: StoragePath, name: str, uri: str) -> None:
    assert recording_uri(folder, name, True) == uri
    with pytest.raises(ValueError) as caught:
        recording_uri(folder, name, False)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (BUCKET, "/etc/a.wav"),
        (BUCKET, "file:///etc/a.wav"),
        (BUCKET, "local:///etc/a.wav"),
        (BUCKET, "simplecache::file:///etc/a.wav"),
        (DISK, "local:///etc/a.wav"),
        (DISK, "https://host/a.wav"),
        (BUCKET, "s3://key:sesame@bucket/corpus/a.wav"),
        (BUCKET, "s3://bucket/corpus/a.wav?endpoint_override=evil.example"),
        (DISK, "abfs://box:sesame@account.host/a.wav"),
    ],
)
def test_some_things_are_never_named(folder: StoragePath, name: str, allowed: bool) -> None:
    known = dict(places._known)
    with pytest.raises(ValueError) as caught:
        recording_uri(folder, name, allowed)
    assert "sesame" not in str(caught.value)
    assert places._known == known, "a row does not say where a bucket is"


def test_rows_do_not_say_where_a_bucket_is() -> None:
    as_path("s3://known/corpus?region=here")
    for uri in ("s3://known/a?region=there", "s3://known/a.wav"):
        found = literal_path(uri)
        assert isinstance(found, ObjectPath)
        assert found.uri.startswith("s3://known/a") and found.uri.endswith("region=here")
    assert str(literal_path("s3://known/a?region=there")) == "s3://known/a?region=there"
    assert literal_path("/a/b?c") == Path("/a/b?c")


def test_a_container_is_part_of_a_name_and_its_password_is_not() -> None:
    assert str(as_path("abfs://box:sesame@account.host/a")) == "abfs://box@account.host/a"
    assert str(as_path("abfs://:sesame@account.host/box/a")) == "abfs://account.host/box/a"
    assert str(as_path("hdfs://user@namenode:8020/a")) == "hdfs://user@namenode:8020/a"
    assert str(as_path("oss://box:ses/ame@host/a")) == "oss://box@host/a"
    assert public_uri("wds:s3://key:sesame@b/x-*.tar?region=r") == "wds:s3://b/x-*.tar"
    assert public_uri("embedded:train") == "embedded:train" and public_uri("a/b?c") == "a/b?c"


# -- in a real bucket ------------------------------------------------------------------------------

SECONDS = {"short.wav": 1.0, "long.wav": 9.0, "long.flac": 9.0, "long.ogg": 60.0}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("named") as uri:
        yield uri


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that the server answers, by method."""
    counts: Counter[str] = Counter()

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for method in ("HEAD", "GET", "PUT", "POST"):
                counts[method] += f"{method} /" in record.getMessage()

    handler, logger = Counting(), logging.getLogger("werkzeug")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "propagate", False)
    return counts


def _corpus(there: ObjectPath, tmp_path: Path) -> str:
    """Recordings and their manifest, here and there; returns that of the latter."""
    rng, lines = np.random.default_rng(0), []
    for name, seconds in SECONDS.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, round(seconds * 16_000)), 16_000)
        (there / name).upload(path)
        lines += [{"id": name, "audio": name, "text": "hello"}]
        lines += [{"id": f"{name} part", "audio": name, "text": "hello", "offset": 0.5}]
    (tmp_path / "corpus" / "m.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (there / "m.jsonl").upload(tmp_path / "corpus" / "m.jsonl")
    return (there / "m.jsonl").uri


def _there(bucket: str, name: str) -> ObjectPath:
    found = as_path(bucket) / name
    assert isinstance(found, ObjectPath)
    return found


def test_measuring_reads_the_ends_of_objects_alone(
    bucket: str, tmp_path: Path, asked: Counter[str]
) -> None:
    spec = _corpus(_there(bucket, "ends"), tmp_path)
    asked.clear()
    found = build_index([spec])
    rows = 2 * len(SECONDS)
    # The manifest and each row: one look, both ends, and what the header asks for beyond them.
    assert asked["HEAD"] <= 2 + 2 * rows and asked["GET"] <= 2 + 3 * rows, asked
    local = build_index([str(tmp_path / "corpus" / "m.jsonl")])
    for name in ("id", "samples", "key"):
        assert found.table[name].to_pylist() == local.table[name].to_pylist(), name


def test_an_object_has_the_key_of_its_file_where_both_ends_are_silent(
    bucket: str, tmp_path: Path
) -> None:
    there, rng, rows = _there(bucket, "silent"), np.random.default_rng(0), []
    for name in ("one.wav", "another.wav"):
        samples = np.zeros(200 * 16_000)  # 6.4 MB: more than one reading
        samples[100 * 16_000 :][:16_000] = rng.uniform(-0.1, 0.1, 16_000)
        soundfile.write(tmp_path / name, samples, 16_000)
        (there / name).upload(tmp_path / name)
        rows.append(json.dumps({"audio": name, "text": "hello"}) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(rows))
    (there / "m.jsonl").upload(tmp_path / "m.jsonl")
    keys = build_index([(there / "m.jsonl").uri]).table["key"].to_pylist()
    assert keys == build_index([str(tmp_path / "m.jsonl")]).table["key"].to_pylist()
    assert keys[0] != keys[1]


@pytest.mark.parametrize("listed", [2, 1000])
def test_measurements_of_objects_are_kept_between_runs(
    bucket: str,
    tmp_path: Path,
    asked: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    listed: int,
) -> None:
    monkeypatch.setattr(measure, "_LISTED", listed)
    there = _there(bucket, f"kept-{listed}")
    spec = _corpus(there, tmp_path)
    first = build_index([spec], cache_dir=tmp_path / "cache")
    asked.clear()
    monkeypatch.setattr(measure, "_measure_object", None)  # nothing is read again
    again = build_index([spec], cache_dir=tmp_path / "cache")
    assert again.table.equals(first.table)
    looks = len(SECONDS) if listed > len(SECONDS) else 0
    assert asked["HEAD"] <= 3 + looks and asked["GET"] <= 3, "one listing, or a look at each"
    monkeypatch.undo()

    (there / "short.wav").unlink()
    os.utime(tmp_path / "corpus" / "long.wav")
    soundfile.write(tmp_path / "corpus" / "long.flac", np.zeros(8_000), 16_000)
    (there / "long.flac").upload(tmp_path / "corpus" / "long.flac")
    monkeypatch.setattr(measure, "_LISTED", listed)
    third = build_index([spec], cache_dir=tmp_path / "cache")
    assert {r.id: r.reason for r in third.rejects} == {
        "short.wav": "missing",
        "short.wav part": "missing",
        "long.flac part": "span outside the file",
    }
    samples = dict(zip(*(third.table[n].to_pylist() for n in ("id", "samples")), strict=True))
    assert samples["long.flac"] == 8_000 and samples["long.wav"] == 144_000


def test_a_server_that_is_away_while_measuring_rejects_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _corpus(_there(bucket, "away"), tmp_path)
    monkeypatch.setattr(measure, "_PATIENCE_SECONDS", 0.5)
    ranges, tries = ObjectPath.ranges, Counter[str]()

    def flaky(self: ObjectPath) -> Any:
        tries[self.name] += 1
        if self.name == "long.wav" and tries[self.name] < 3:
            raise OSError("Could not connect")
        return ranges(self)

    monkeypatch.setattr(ObjectPath, "ranges", flaky)
    assert len(build_index([spec])) == 2 * len(SECONDS), "it came back"
    tries["long.wav"] = -100
    with pytest.raises(OSError, match="Could not connect"):
        build_index([spec])


def test_an_archive_that_was_cut_short_rejects_what_is_gone(bucket: str, tmp_path: Path) -> None:
    there = _there(bucket, "short")
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    data = (tmp_path / "a.wav").read_bytes()
    (there / "x.bin").write_bytes(data + data[:100])
    places = [(0, len(data)), (len(data), len(data)), (5 * len(data), len(data))]
    rows = [
        {"uri": str(there / "x.bin"), "offset": first, "length": length}
        | {"start": 0.0, "duration": None, "audios": None}
        for first, length in places
    ]
    good, cut, gone = measure.measure_rows(rows)
    assert isinstance(good, dict) and good["samples"] == 16_000
    for found in (cut, gone):
        assert getattr(found, "reason", None) == "unreadable"


def test_messages_and_names_of_parts_have_no_credentials(bucket: str, tmp_path: Path) -> None:
    there = _there(bucket, "said")
    (there / "m.jsonl").write_text('{"audio": "gone.wav", "text": "a"}\n')
    (there / "empty.jsonl").write_text("")
    for name, named in (("m.jsonl", "gone.wav"), ("empty.jsonl", "empty.jsonl")):
        with pytest.raises(ManifestError, match=named) as caught:
            build_index([(there / name).uri])
        assert "secret" not in str(caught.value) and "endpoint" not in str(caught.value)
    spec = (there / "m.jsonl").uri
    for given in (spec, str(there / "m.jsonl")):
        source = open_source(given, Options())
        [part] = source.parts()
        assert "secret" not in source.spec
        assert part_name(source, part) == part_name(open_source(spec, Options()), part)
    with pytest.raises(ManifestError) as caught:
        open_source((there / "nothing").uri, Options())
    assert "secret" not in str(caught.value)


def test_parquet_rows_name_objects_in_place(bucket: str, tmp_path: Path) -> None:
    there = _there(bucket, "table")
    soundfile.write(tmp_path / "a.wav", np.linspace(-0.5, 0.5, 16_000), 16_000)
    (there / "corpus" / "clips" / "a.wav").upload(tmp_path / "a.wav")
    (there / "other" / "a.wav").upload(tmp_path / "a.wav")
    outside = str(there / "other" / "a.wav")
    table = pa.table({"audio": ["clips/a.wav", outside], "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "m.parquet")
    (there / "corpus" / "m.parquet").upload(tmp_path / "m.parquet")
    spec = str(there / "corpus" / "m.parquet")

    def uris(**options: Any) -> list[str]:
        source = open_source(spec, Options(**options))
        return [row.uri for part in source.parts() for row in source.read(part)]

    assert uris(allow_absolute=True) == [str(there / "corpus" / "clips" / "a.wav"), outside]
    with pytest.raises(ManifestError, match=r"m\.parquet:2: .*/other/a\.wav"):
        uris()
    assert len(decode(outside)) == 16_000


AWAY = "s3://gone/x.jsonl?endpoint_override=127.0.0.1:9&scheme=http&region=r"


def test_a_manifest_that_is_away_is_one_line_and_no_wrong_setting() -> None:
    config = Config.model_validate({"data": {"train": [AWAY], "cache": None}})
    with pytest.raises(RuntimeError, match="data: .*gone") as caught:
        build_indexes(config)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_that_is_away_is_one_line_and_no_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index.main(["--source", AWAY, "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: --source s3://gone/x.jsonl: ")
    assert "secret" not in line and "\n" not in line
    assert index.main(["--source", "nowhere://b/x.jsonl", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --source: nowhere://b")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_cut_names_its_object_by_url(bucket: str, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    there = _there(bucket, "cuts")
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    (there / "clips" / "a.wav").upload(tmp_path / "a.wav")
    local = lhotse.Recording.from_file(tmp_path / "a.wav", recording_id="a")
    urls = [str(there / "clips" / "a.wav"), "https://host/a.wav"]
    cuts = []
    for number, url in enumerate(urls):
        source = lhotse.audio.AudioSource("url", [0], url)
        recording = lhotse.Recording("a", [source], 16_000, local.num_samples, local.duration)
        said = lhotse.SupervisionSegment("a", "a", 0.0, 1.0, text="hello")
        cuts.append(lhotse.MonoCut(f"c{number}", 0.0, 1.0, 0, [said], recording=recording))
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    (there / "cuts.jsonl.gz").upload(tmp_path / "cuts.jsonl.gz")
    source = open_source(str(there / "cuts.jsonl.gz"), Options())
    first, second = (row for part in source.parts() for row in source.read(part))
    assert (first.uri, first.text, first.error) == (urls[0], "hello", None)
    assert second.error is not None and second.error[0] == "no audio file"


def test_many_reads_keep_their_order_and_end_with_the_first_error() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        if number == 50:
            raise OSError("away")
        return number

    assert list(parallel_map(read, range(40))) == list(range(40))
    with pytest.raises(OSError, match="away"):
        list(parallel_map(read, range(10_000)))
    assert max(begun) < 100, "what had not begun is given up"
