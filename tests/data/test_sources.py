"""The same utterances in every shape in which people keep speech give the same index."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

import omni
from omni.data.audio import ByteRange, decode
from omni.data.built import finish
from omni.data.index import Index, ManifestError, build_index
from omni.data.measure import span_of
from omni.data.parts import write_part
from omni.data.sources import Options, open_source
from omni.model.whisper import WhisperEncoder

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROWS = 30
Rows = list[dict[str, Any]]


def make_corpus(folder: Path, rows: int = ROWS) -> Rows:
    """The first recordings of the embedded corpus as FLAC, which other formats can hold without
    loss, with a manifest beside them."""
    found = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    corpus = []
    for number, row in enumerate(found[:rows]):
        samples, rate = soundfile.read(ASSETS / row["audio"], dtype="int16")
        path = folder / "clips" / f"{number:04}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate)
        corpus.append(
            {
                "id": f"u{number:04}",
                "audio": f"clips/{path.name}",
                "text": row["text"],
                "language": "en",
                "speaker": f"s{number % 3}",
            }
        )
    lines = [json.dumps(row) + "\n" for row in corpus]
    (folder / "corpus.jsonl").write_text("".join(lines))
    return corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    make_corpus(path)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]


def index(out: Path, *specs: str, **options: Any) -> Index:
    """What jobs.index does with sources, without Ray."""
    given = Options(**{"rows_per_part": 7, **options})
    sources = [open_source(spec, given) for spec in specs]
    tasks = [(source, part) for source in sources for part in source.parts()]
    for source, part in tasks:
        write_part(source, part, given, out)
    finish(tasks, out)
    return build_index([str(out)])


# -- writers: each puts the corpus into a folder and returns its SPEC -----------------------------


def write_jsonl(folder: Path, rows: Rows, to: Path) -> str:
    return str(folder / "corpus.jsonl")


def write_csv(folder: Path, rows: Rows, to: Path) -> str:
    with (to / "corpus.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "audio", "text", "language", "speaker"])
        writer.writeheader()
        writer.writerows({**row, "audio": str(folder / row["audio"])} for row in rows)
    return str(to / "corpus.csv")


def write_tsv(folder: Path, rows: Rows, to: Path) -> str:
    lines = ["utterance_id\tpath\tsentence\tlocale\tspeaker_id"]
    names = ("id", "audio", "text", "language", "speaker")
    lines += ["\t".join({**row, "audio": str(folder / row["audio"])}[n] for n in names)
              for row in rows]  # fmt: skip
    (to / "corpus.tsv").write_text("\n".join(lines) + "\n")
    return str(to / "corpus.tsv")


def _columns(rows: Rows) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in ("id", "text", "language", "speaker")}


def write_parquet_manifest(folder: Path, rows: Rows, to: Path) -> str:
    paths = [str(folder / row["audio"]) for row in rows]
    table = pa.table({**_columns(rows), "audio": paths})
    pq.write_table(table, to / "corpus.parquet", row_group_size=4)
    return str(to / "corpus.parquet")


def write_parquet_bytes(folder: Path, rows: Rows, to: Path) -> str:
    for number in range(2):
        share = rows[number * 15 :][: 15 if number == 0 else None]
        audio = [(folder / row["audio"]).read_bytes() for row in share]
        table = pa.table({**_columns(share), "wav": audio})
        pq.write_table(table, to / f"part-{number}.parquet", row_group_size=6)
    return str(to)


def _dataset(folder: Path, rows: Rows) -> Any:
    """A Hugging Face dataset with an Audio column."""
    datasets = pytest.importorskip("datasets")
    audio = [str(folder / row["audio"]) for row in rows]
    plain = datasets.Dataset(pa.table({**_columns(rows), "audio": audio}))
    return plain.cast_column("audio", datasets.Audio())


def write_saved(folder: Path, rows: Rows, to: Path) -> str:
    import datasets

    both = {"train": _dataset(folder, rows), "test": _dataset(folder, rows[:3])}
    datasets.DatasetDict(both).save_to_disk(to / "saved", num_shards={"train": 3, "test": 1})
    return f"hf:{to}/saved:train"


def write_hf_parquet(folder: Path, rows: Rows, to: Path) -> str:
    """As on the hub: Parquet shards with the audio inside."""
    dataset = _dataset(folder, rows)
    dataset.save_to_disk(to / "whole")  # puts the bytes in
    from datasets import load_from_disk

    dataset = load_from_disk(to / "whole")
    for number in range(3):
        shard = dataset.shard(3, number, contiguous=True)
        shard.to_parquet(to / "hub" / "data" / f"train-{number:05}-of-00003.parquet")
    return f"hf:{to}/hub"


def write_audiofolder(folder: Path, rows: Rows, to: Path) -> str:
    shutil.copytree(folder / "clips", to / "af" / "train")
    lines = [{**row, "file_name": Path(row["audio"]).name} for row in rows]
    for line in lines:
        del line["audio"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (to / "af" / "train" / "metadata.jsonl").write_text(text)
    return f"hf:{to}/af:train"


def write_webdataset(folder: Path, rows: Rows, to: Path) -> str:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(to / "shard-%04d.tar"), maxcount=12, verbose=0) as sink:
        for row in rows:
            fields = {name: row[name] for name in ("text", "language", "speaker")}
            audio = (folder / row["audio"]).read_bytes()
            sink.write({"__key__": row["id"], "flac": audio, "json": fields})
    return str(to)


def _cuts(folder: Path, rows: Rows) -> Any:
    lhotse = pytest.importorskip("lhotse")
    cuts = []
    for row in rows:
        recording = lhotse.Recording.from_file(folder / row["audio"], recording_id=row["id"])
        said = lhotse.SupervisionSegment(
            row["id"], row["id"], 0.0, recording.duration,
            text=row["text"], language=row["language"], speaker=row["speaker"],
        )  # fmt: skip
        cuts.append(
            lhotse.MonoCut(row["id"], 0.0, recording.duration, 0, [said], recording=recording)
        )
    return lhotse.CutSet.from_cuts(cuts)


def write_cuts(folder: Path, rows: Rows, to: Path) -> str:
    _cuts(folder, rows).to_file(to / "cuts.jsonl.gz")
    return str(to / "cuts.jsonl.gz")


def write_shar(folder: Path, rows: Rows, to: Path) -> str:
    _cuts(folder, rows).to_shar(to, fields={"recording": "flac"}, shard_size=12)
    return str(to)


def write_shar_original(folder: Path, rows: Rows, to: Path) -> str:
    _cuts(folder, rows).to_shar(to, fields={"recording": "original"}, shard_size=12)
    return str(to)


def write_kaldi(folder: Path, rows: Rows, to: Path) -> str:
    _kaldi_tables(rows, to)
    lines = [f"{row['id']} {folder / row['audio']}\n" for row in rows]
    (to / "wav.scp").write_text("".join(lines))
    return str(to)


def write_kaldi_ark(folder: Path, rows: Rows, to: Path) -> str:
    kaldiio = pytest.importorskip("kaldiio")
    _kaldi_tables(rows, to)
    with kaldiio.WriteHelper(f"ark,scp:{to}/wav.ark,{to}/wav.scp") as writer:
        for row in rows:
            samples, rate = soundfile.read(folder / row["audio"], dtype="int16")
            writer(row["id"], (rate, samples))
    return f"kaldi:{to}"


def write_kaldi_segments(folder: Path, rows: Rows, to: Path) -> str:
    """All utterances one after another in one recording. No library writes these; the format is
    that of https://kaldi-asr.org/doc/data_prep.html."""
    _kaldi_tables(rows, to)
    held = [soundfile.read(folder / row["audio"], dtype="int16")[0] for row in rows]
    ends = np.cumsum([len(samples) for samples in held]) / 16_000
    soundfile.write(to / "all.wav", np.concatenate(held), 16_000)
    (to / "wav.scp").write_text("rec all.wav\n")
    starts = [0.0, *ends[:-1]]
    lines = [f"{row['id']} rec {a} {b}\n" for row, a, b in zip(rows, starts, ends, strict=True)]
    (to / "segments").write_text("".join(lines))
    return str(to)


def _kaldi_tables(rows: Rows, to: Path) -> None:
    for name, field in (("text", "text"), ("utt2spk", "speaker"), ("utt2lang", "language")):
        lines = [f"{row['id']} {row[field]}\n" for row in rows]
        (to / name).write_text("".join(lines))


def write_folder(folder: Path, rows: Rows, to: Path) -> str:
    for row in rows:
        path = to / f"{row['id']}.flac"
        shutil.copy(folder / row["audio"], path)
        path.with_suffix(".txt").write_text(row["text"] + "\n")
    return f"folder:{to}"


# name: (writer, whether the recordings' bytes are the same, whether it tells speakers)
SHAPES: dict[str, tuple[Callable[[Path, Rows, Path], str], bool, bool]] = {
    "jsonl": (write_jsonl, True, True),
    "csv": (write_csv, True, True),
    "tsv": (write_tsv, True, True),
    "parquet manifest": (write_parquet_manifest, True, True),
    "parquet bytes": (write_parquet_bytes, True, True),
    "hf saved": (write_saved, True, True),
    "hf parquet": (write_hf_parquet, True, True),
    "hf audiofolder": (write_audiofolder, True, True),
    "webdataset": (write_webdataset, True, True),
    "cuts": (write_cuts, True, True),
    "shar": (write_shar, False, True),
    "shar original": (write_shar_original, True, True),
    "kaldi": (write_kaldi, True, True),
    "kaldi ark": (write_kaldi_ark, False, True),
    "kaldi segments": (write_kaldi_segments, False, True),
    "folder": (write_folder, True, False),
}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(folder / "corpus.jsonl")])


@pytest.fixture(scope="module")
def encoder() -> Iterator[WhisperEncoder]:
    yield WhisperEncoder("embedded")


def audio_of(found: Index) -> list[np.ndarray]:
    return [decode(row["uri"], span_of(row)) for row in found.table.to_pylist()]


def same(found: Index, expected: Index, bytes_too: bool, speakers: bool) -> None:
    """The content of two indexes is the same."""
    columns = ["id", "text", "samples", *(["key"] if bytes_too else [])]
    columns += ["language", "speaker"] if speakers else []
    assert found.rejects == []
    for name in columns:
        assert found.table[name].to_pylist() == expected.table[name].to_pylist(), name
    if bytes_too:
        assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_index_and_sound(
    shape: str, folder: Path, rows: Rows, expected: Index, encoder: WhisperEncoder, tmp_path: Path
) -> None:
    write, bytes_too, speakers = SHAPES[shape]
    (tmp_path / "in").mkdir()
    spec = write(folder, rows, tmp_path / "in")
    found = index(tmp_path / "out", spec, allow_absolute=True)
    same(found, expected, bytes_too, speakers)
    audio, wanted = audio_of(found), audio_of(expected)
    for one, other in zip(audio, wanted, strict=True):
        assert np.array_equal(one, other)
    features = [encoder.encode([clips[0], clips[7]]) for clips in (audio, wanted)]
    for one, other in zip(*features, strict=True):
        assert (one - other).abs().max() < 1e-3
