"""Datasets as `datasets` and webdataset write them: label names, tars, archives of recordings."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from omni.corpus.index import build_index
from omni.corpus.sources import Options, Row, open_source
from omni.errors import ManifestError
from tests.corpus.test_sources import index

LANGUAGES, SPEAKERS = ["th", "de", "zh"], ["anna", "bob", "carl"]


def _sound(number: int = 0) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.sin(np.arange(1600 * (number + 1))), 16_000, format="FLAC")
    return data.getvalue()


def _labelled() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "text": datasets.Value("string"),
            "language": datasets.ClassLabel(names=LANGUAGES),
            "speaker_id": datasets.ClassLabel(names=SPEAKERS),
            "emotion": datasets.ClassLabel(names=["calm", "angry"]),
        }
    )
    columns = {
        "audio": [{"bytes": _sound(n), "path": None} for n in range(3)],
        "text": ["a", "b", "c"],
        "language": [0, 2, 1],
        "speaker_id": [2, 0, -1],  # -1: no label
        "emotion": [1, 0, 1],
    }
    return datasets.Dataset(pa.table(columns)).cast(features)


def _rows(spec: str, **options: Any) -> list[Row]:
    source = open_source(spec, Options(**options))
    return [row for part in source.parts() for row in source.read(part)]


def test_labels_are_their_names_in_every_shape(tmp_path: Path) -> None:
    dataset = _labelled()
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    for spec in (f"parquet:{tmp_path}/hub", f"hf:{tmp_path}/hub", f"hf:{tmp_path}/saved"):
        rows = _rows(spec)
        assert [(row.language, row.speaker) for row in rows] == [
            ("th", "carl"), ("zh", "anna"), ("de", None)
        ], spec  # fmt: skip
        assert [r.text for r in _rows(spec, columns={"text": "emotion"})] == [
            "angry", "calm", "angry"
        ]  # fmt: skip


def test_labels_of_a_dataset_card(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    table = {"audio": [{"bytes": _sound(), "path": None}], "text": ["a"], "language": [2]}
    pq.write_table(pa.table(table), tmp_path / "train-00000-of-00001.parquet")
    labels = "".join(f"          '{n}': {name}\n" for n, name in enumerate(LANGUAGES))
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: audio\n    dtype: audio\n"
        "  - name: text\n    dtype: string\n  - name: language\n    dtype:\n"
        f"      class_label:\n        names:\n{labels}---\n"
    )
    assert [row.language for row in _rows(f"hf:{tmp_path}")] == ["zh"]


def test_a_label_without_a_name_names_its_row(tmp_path: Path) -> None:
    names = {"info": {"features": {"language": {"names": ["th"], "_type": "ClassLabel"}}}}
    schema = pa.schema(
        [("audio", pa.binary()), ("text", pa.string()), ("language", pa.int64())],
        metadata={"huggingface": json.dumps(names)},
    )
    columns = {"audio": [_sound()] * 2, "text": ["a", "b"], "language": [0, 1]}
    pq.write_table(pa.table(columns, schema), tmp_path / "x.parquet")
    with pytest.raises(ManifestError, match=r"x\.parquet:2: field 'language': label 1 of 1"):
        _rows(f"{tmp_path}/x.parquet")


def _shard(path: Path, first: int) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(path)) as sink:
        for n in range(first, first + 3):
            fields = {"text": f"text {n}", "lang": "de"} | ({"extra": n} if n % 2 else {})
            sink.write({"__key__": f"u{n}", "flac": _sound(n), "json": fields})


def test_tars_of_a_dataset_are_read_to_their_end(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    for number in range(2):
        _shard(tmp_path / "hub" / f"train-{number:04}.tar", 3 * number)
    with tarfile.open(tmp_path / "hub" / "train-0001.tar", "a") as tar:
        for name, data in (("README", b"x"), ("u9.json", b'{"text": "no audio"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = index(tmp_path / "out", f"hf:{tmp_path}/hub")
    assert found.table["text"].to_pylist() == [f"text {n}" for n in range(6)]
    assert found.table["samples"].to_pylist() == [1600 * (n + 1) for n in range(6)]
    assert set(found.table["language"].to_pylist()) == {"de"}
    assert [(r.id, r.reason) for r in found.rejects] == [("u9", "no audio")]
    plain = build_index([str(p) for p in sorted((tmp_path / "hub").iterdir())])
    assert plain.table["key"] == found.table["key"]


def test_a_compressed_tar_of_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    _shard(tmp_path / "plain.tar", 0)
    (tmp_path / "hub").mkdir()
    with gzip.open(tmp_path / "hub" / "train.tar.gz", "wb") as file:
        shutil.copyfileobj((tmp_path / "plain.tar").open("rb"), file)
    found = index(tmp_path / "out", f"hf:{tmp_path}/hub")
    assert found.table["key"] == build_index([str(tmp_path / "plain.tar")]).table["key"]


@pytest.mark.parametrize("folder", ["", "clips/"])
def test_a_zip_of_recordings_with_their_texts(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for n in range(3):
            archive.writestr(f"{folder}{n}.flac", _sound(n))
        lines = ["file_name,text", *(f"{n}.flac,text {n}" for n in range(3))]
        archive.writestr(f"{folder}metadata.csv", "\n".join(lines))
    found = index(tmp_path / "out", f"hf:{tmp_path}")
    assert found.table["text"].to_pylist() == [f"text {n}" for n in range(3)]
    assert found.table["samples"].to_pylist() == [1600 * (n + 1) for n in range(3)]
    assert found.rejects == []


@pytest.mark.parametrize(
    "name",
    ["zip://a::/etc/a.zip", "zip://a::../a.zip", "zip://a::file:///etc/a.zip"],
)
def test_archives_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"audio": [name], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ManifestError, match=r"x\.parquet:1: "):
        _rows(f"{tmp_path}/x.parquet")
