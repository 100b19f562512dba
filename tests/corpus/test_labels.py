"""Columns of a corpus become labels, from every shape that has columns, and change nothing else."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import index as index_job
from omni.config.load import parse_config
from omni.corpus.index import build_index
from omni.corpus.labels import kept_fields, labels_json, labels_of
from omni.corpus.manifest import ManifestError
from omni.corpus.splits import build_indexes
from omni.errors import ConfigError

Record = Callable[..., Path]
Manifest = Callable[..., str]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "one", "speaker": "Ann", "mood": "calm", "rate": 4.5},
    {"id": "b", "text": "two", "speaker": "Bob", "mood": "loud", "rate": 3.0},
    {"id": "c", "text": "three", "speaker": "Ann", "mood": None, "rate": 2.0},
]
KEPT = [
    {"speaker": "Ann", "mood": "calm", "rate": 4.5},
    {"speaker": "Bob", "mood": "loud", "rate": 3.0},
    {"speaker": "Ann", "rate": 2.0},
]


@pytest.fixture
def recorded(record: Record, tmp_path: Path) -> Path:
    for number, row in enumerate(ROWS):
        record(f"{row['id']}.wav", hertz=300.0 + 100 * number)
    return tmp_path


def _jsonl(folder: Path) -> str:
    rows = [{**row, "audio": f"{row['id']}.wav"} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def _csv(folder: Path) -> str:
    lines = ["id,audio,text,speaker,mood,rate"]
    lines += [f"{r['id']},{r['id']}.wav,{r['text']},{r['speaker']},{r['mood'] or ''},{r['rate']}"
              for r in ROWS]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "rows.csv")


def _parquet(folder: Path) -> str:
    rows = [{**row, "audio": (folder / f"{row['id']}.wav").read_bytes()} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def _tar(folder: Path) -> str:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for row in ROWS:
            tar.add(folder / f"{row['id']}.wav", f"{row['id']}.wav")
            data = json.dumps({k: v for k, v in row.items() if k != "id"}).encode()
            info = tarfile.TarInfo(f"{row['id']}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(folder / "rows.tar")


def _cuts(folder: Path) -> str:
    cuts = [
        {
            "id": row["id"], "start": 0, "duration": 1.0,
            "supervisions": [{"text": row["text"], "speaker": row["speaker"], "mood": row["mood"],
                              "custom": {"rate": row["rate"]}}],
            "recording": {"sources": [{"type": "file", "source": f"{row['id']}.wav"}],
                          "duration": 1.0},
        }
        for row in ROWS
    ]  # fmt: skip
    (folder / "cuts.jsonl").write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    return f"cuts:{folder}/cuts.jsonl"


def _kaldi(folder: Path) -> str:
    files: dict[str, list[str]] = {
        "wav.scp": [f"{row['id']} {row['id']}.wav" for row in ROWS],
        "text": [f"{row['id']} {row['text']}" for row in ROWS],
        "utt2spk": [f"{row['id']} {row['speaker']}" for row in ROWS],
        "utt2mood": [f"{row['id']} {row['mood']}" for row in ROWS if row["mood"]],
        "utt2rate": [f"{row['id']} {row['rate']}" for row in ROWS],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return f"kaldi:{folder}"


@pytest.mark.parametrize(
    ("write", "typed"),
    [(_jsonl, True), (_csv, False), (_parquet, True), (_tar, True), (_cuts, True), (_kaldi, False)],
)
def test_every_shape_keeps_the_columns_that_are_asked_for(
    write: Callable[[Path], str], typed: bool, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = write(recorded), recorded / "out"
    given = ["--source", spec, "--out", str(out), "--keep", "speaker,mood", "--keep", "rate"]
    assert index_job.main(given) == 0
    assert "mood 2, rate 3" in capsys.readouterr().out
    expected = [kept if typed else {k: str(v) for k, v in kept.items()} for kept in KEPT]
    rows = build_index([str(out)]).table.to_pylist()
    assert [labels_of(row) for row in rows] == expected
    direct = build_index([spec], cache_dir=recorded / "cache", keep=["mood", "rate"])
    assert [labels_of(row) for row in direct.table.to_pylist()] == expected


def test_a_corpus_without_labels_is_what_it_was(recorded: Path) -> None:
    spec = _jsonl(recorded)
    out = {name: recorded / name for name in ("plain", "kept")}
    for name, keep in (("plain", []), ("kept", ["--keep", "mood"])):
        assert index_job.main(["--source", spec, "--out", str(out[name]), *keep]) == 0
    [plain], [kept] = (list(folder.glob("parts/*.parquet")) for folder in out.values())
    assert "labels" not in pq.read_schema(plain).names, "the files of before"
    assert "labels" in pq.read_schema(kept).names
    prints = {build_index([str(source)]).fingerprint for source in (*out.values(), spec)}
    assert len(prints) == 1
    [both] = {build_index([spec], keep=["mood"]).fingerprint} | prints
    rows = build_index([str(out["plain"])]).table.to_pylist()
    assert [row["labels"] for row in rows] == [None] * 3
    # The same folder takes up the columns that are asked for later.
    assert index_job.main(["--source", spec, "--out", str(out["plain"]), "--keep", "mood"]) == 0
    rows = build_index([str(out["plain"])]).table.to_pylist()
    assert [labels_of(row).get("mood") for row in rows] == ["calm", "loud", None]


def test_a_field_called_labels_is_not_taken_for_labels(recorded: Path) -> None:
    rows = [{"audio": "a.wav", "text": "one", "labels": value} for value in ("x", {"mood": "y"})]
    path = recorded / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["labels"] for row in build_index([str(path)]).table.to_pylist()] == [None, None]


def test_a_column_that_no_utterance_has_is_named(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = _jsonl(recorded)
    out = recorded / "out"
    assert index_job.main(["--source", spec, "--out", str(out), "--keep", "mod"]) == 2
    assert "'mod'" in capsys.readouterr().err
    shutil.rmtree(out)
    config = parse_config({"data": {"train": spec, "dev": spec, "keep": "mod", "cache": None}})
    with pytest.raises(ConfigError, match=r"data\.keep.*'mod'"):
        build_indexes(config)


@pytest.mark.parametrize("name", ["labels", "seconds", " "])
def test_a_name_with_another_meaning_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        index_job.main(["--source", "a.jsonl", "--out", "out", "--keep", f"mood,{name}"])
    assert stopped.value.code == 2 and "--keep" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"data\.keep"):
        parse_config({"data": {"keep": [name]}})


@pytest.mark.parametrize("value", [["a"], {"a": 1}, float("nan"), float("inf"), "a\0b", "\ud800"])
def test_what_no_label_can_hold_names_its_row_and_field(value: Any) -> None:
    with pytest.raises(ManifestError, match=r"rows\.jsonl:3: field 'mood'"):
        labels_json("rows.jsonl:3", kept_fields({"mood": value}, ["mood"]))


def test_labels_are_texts_and_numbers() -> None:
    fields = {"a": True, "b": 2, "c": 0.5, "d": "x", "e": None, "f": 1}
    text = labels_json("row 1", kept_fields(fields, "abcdeg"))
    row = {"labels": text, "speaker": "Ann", "language": None}
    assert labels_of(row) == {"a": "true", "b": 2, "c": 0.5, "d": "x", "speaker": "Ann"}
