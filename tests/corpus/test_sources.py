"""The same utterances in every shape in which people keep speech give the same index."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from ray import cloudpickle

import omni
from omni.audio.decode import decode
from omni.corpus.build_part import about_part, fingerprint, part_name, write_part
from omni.corpus.build_tasks import own_task
from omni.corpus.built_index import finish
from omni.corpus.index import Index, build_index
from omni.corpus.index_row import span_of
from omni.corpus.lengths import measure_rows
from omni.corpus.manifest import ManifestError
from omni.corpus.sources import Options, Row, open_source
from omni.storage.byte_range import ByteRange

ASSETS = Path(omni.__file__).parent / "assets" / "prompts-en"
ROWS = 30
Rows = list[dict[str, Any]]
CUT = {"id": "u", "start": 0, "duration": 1.0, "supervisions": [{"text": "a"}]}
FILE = {"sources": [{"type": "file", "source": "a.wav"}], "duration": 1.0}


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
    given = Options(**{"rows_per_part": 12, **options})
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


@dataclass(frozen=True)
class Expected:
    """The index of the plain manifest, and its sound."""

    index: Index
    audio: list[np.ndarray]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    found = build_index([str(folder / "corpus.jsonl")])
    return Expected(found, audio_of(found))


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
    shape: str, folder: Path, rows: Rows, expected: Expected, tmp_path: Path
) -> None:
    write, bytes_too, speakers = SHAPES[shape]
    (tmp_path / "in").mkdir()
    spec = write(folder, rows, tmp_path / "in")
    found = index(tmp_path / "out", spec, allow_absolute=True)
    same(found, expected.index, bytes_too, speakers)
    direct = build_index([spec], cache_dir=tmp_path / "cache", allow_absolute=True)
    same(direct, expected.index, bytes_too, speakers)
    for one, other in zip(audio_of(found), expected.audio, strict=True):
        assert np.array_equal(one, other), "these formats are without loss"


# -- what is in a row ------------------------------------------------------------------------------


def read_all(spec: str, **options: Any) -> list[Row]:
    source = open_source(spec, Options(**options))
    return [row for part in source.parts() for row in source.read(part)]


def test_a_task_gets_what_its_own_part_needs(tmp_path: Path) -> None:
    """Tasks for all parts of 300 shards and tables are as small as those of 3, and read alike."""
    flac = make_corpus(tmp_path, 1)[0]["audio"]
    table = pa.table({"id": ["x"], "audio": [(tmp_path / flac).read_bytes()], "text": ["hi"]})
    (tmp_path / "0.txt").write_text("said")
    for kind in ("tar", "parquet"):
        (tmp_path / kind).mkdir()
        sizes = {}
        for count in (3, 300):
            for number in range(count):
                path = tmp_path / kind / f"{number:03}.{kind}"
                if number % 100:
                    path.hardlink_to(path.with_name(f"{number // 100 * 100:03}.{kind}"))
                elif kind == "parquet":
                    pq.write_table(table, path)
                elif not path.exists():
                    with tarfile.open(path, "w") as tar:
                        tar.add(tmp_path / flac, "0.flac")
                        tar.add(tmp_path / "0.txt", "0.txt")
            source = open_source(str(tmp_path / kind), Options())
            parts = source.parts()
            assert len(parts) == count
            tasks = [cloudpickle.dumps(own_task((source, part))) for part in parts]
            sizes[count] = max(map(len, tasks))
            its_source, its_part = pickle.loads(tasks[2])
            assert list(its_source.read(its_part)) == list(source.read(parts[2]))
            for path in (tmp_path / kind).iterdir():
                path.unlink()
        assert sizes[300] <= sizes[3] + 16, kind


def test_columns_may_have_any_name(folder: Path, rows: Rows, tmp_path: Path) -> None:
    shutil.copytree(folder / "clips", tmp_path / "clips")
    lines = ["recording,gesprochen,wer,client_id"]
    lines += [f'{Path(r["audio"]).name},"{r["text"]}",{n},x' for n, r in enumerate(rows[:3])]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    columns = {"audio": "recording", "text": "gesprochen", "speaker": "wer"}
    found = read_all(str(tmp_path / "m.csv"), columns=columns, audio_folder="clips", language="de")
    assert [(r.text, r.speaker, r.language) for r in found] == [
        (row["text"], str(n), "de") for n, row in enumerate(rows[:3])
    ]
    assert [r.uri for r in found] == [str(tmp_path / row["audio"]) for row in rows[:3]]


def test_a_field_of_a_csv_may_span_lines_and_parts_start_where_rows_do(tmp_path: Path) -> None:
    texts = [f'line {n}\nand "more", é' for n in range(20)]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["audio", "text", "duration", "offset"]])
        csv.writer(file).writerows([[f"{n}.wav", text, 0.5, n] for n, text in enumerate(texts)])
    found = read_all(str(tmp_path / "m.csv"), rows_per_part=3)
    assert [row.text for row in found] == texts
    assert [(row.start, row.duration) for row in found] == [(float(n), 0.5) for n in range(20)]
    assert found[19].id.endswith("m:41"), "the line at which the row ends"


def test_what_is_appended_changes_the_last_part_only(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    shutil.copy(folder / "corpus.jsonl", path)
    before = open_source(str(path), Options(rows_per_part=7)).parts()
    with path.open("a") as file:
        file.write(json.dumps({"audio": "a.wav", "text": "new"}) + "\n")
    after = open_source(str(path), Options(rows_per_part=7)).parts()
    assert after[:-1] == before[:-1] and after[-1].name == before[-1].name
    assert after[-1].fingerprint != before[-1].fingerprint


def test_cuts_are_spans_of_recordings(folder: Path, rows: Rows, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    whole = _cuts(folder, rows[:4])
    spans = lhotse.CutSet.from_cuts(
        [cut.truncate(offset=0.25, duration=0.5, preserve_id=True) for cut in whole]
    )
    spans.to_file(tmp_path / "cuts.jsonl")
    (tmp_path / "shar").mkdir()
    spans.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2)
    found = index(tmp_path / "a", str(tmp_path / "cuts.jsonl"), allow_absolute=True)
    shar = index(tmp_path / "b", str(tmp_path / "shar"))
    for row, one, other in zip(rows, audio_of(found), audio_of(shar), strict=False):
        samples = decode(folder / row["audio"])[4_000:12_000]
        assert np.array_equal(one, samples) and np.array_equal(other, samples)


def test_cuts_that_no_file_holds_are_rejects(folder: Path, rows: Rows, tmp_path: Path) -> None:
    cuts = list(_cuts(folder, rows[:5]))
    mixed = cuts[1].mix(cuts[2], snr=10).with_id("mixed")
    fast = cuts[3].perturb_speed(1.1).with_id("fast")
    lhotse = pytest.importorskip("lhotse")
    lhotse.CutSet.from_cuts([cuts[0], mixed, fast]).to_file(tmp_path / "cuts.jsonl")
    found = index(tmp_path / "out", str(tmp_path / "cuts.jsonl"), allow_absolute=True)
    assert found.table["id"].to_pylist() == ["u0000"]
    assert [(r.id, r.reason) for r in found.rejects] == [
        ("mixed", "no recording"),
        (fast.id, "transformed recording"),
    ]


@pytest.mark.parametrize("channel_ids", [True, False])
def test_one_channel_of_a_call_is_a_reject(channel_ids: bool, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    soundfile.write(tmp_path / "call.wav", np.random.default_rng(0).normal(0, 0.1, (8000, 2)), 8000)
    recording = lhotse.Recording.from_file(tmp_path / "call.wav")
    said = [
        lhotse.SupervisionSegment(f"s{c}", "call", 0.0, 1.0, channel=c, text="a") for c in (0, 1)
    ]
    cuts = [lhotse.MonoCut(f"c{c}", 0.0, 1.0, c, [said[c]], recording=recording) for c in (0, 1)]
    cuts += [
        lhotse.MultiCut("both", 0.0, 1.0, [0, 1], said, recording=recording),
        lhotse.MultiCut("second", 0.0, 1.0, [1], said[1:], recording=recording),
    ]
    lines = [cut.to_dict() for cut in cuts]
    for line in lines if not channel_ids else []:
        del line["recording"]["channel_ids"]  # Then lhotse takes those of the sources.
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "cuts.jsonl").write_text(text)
    read = list(lhotse.CutSet.from_file(tmp_path / "cuts.jsonl"))
    assert [cut.recording.channel_ids for cut in read] == [[0, 1]] * 4
    rows = read_all(f"cuts:{tmp_path}/cuts.jsonl", allow_absolute=True)
    assert [(row.id, row.error and row.error[0]) for row in rows] == [
        ("c0", "one channel of several"), ("c1", "one channel of several"),
        ("both", None), ("second", "one channel of several"),
    ]  # fmt: skip


def test_rows_carry_the_length_that_their_source_states(tmp_path: Path) -> None:
    rows = [{"duration": 2.5}, {"duration": 2.5, "offset": 1}, {}]
    lines = [json.dumps({"audio": "a.wav", "text": "a", **row}) + "\n" for row in rows]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    assert [row.stated_duration for row in read_all(f"{tmp_path}/m.jsonl")] == [2.5, None, None]
    (tmp_path / "m.csv").write_text("audio,text,duration\na.wav,a,2.5\n")
    assert [row.stated_duration for row in read_all(f"{tmp_path}/m.csv")] == [2.5]
    pq.write_table(
        pa.table({"audio": ["a.wav"], "text": ["a"], "duration": [2.5]}), tmp_path / "m.parquet"
    )
    assert [row.stated_duration for row in read_all(f"{tmp_path}/m.parquet")] == [2.5]
    cut = {**CUT, "recording": FILE}
    (tmp_path / "c.jsonl").write_text(
        json.dumps(cut) + "\n" + json.dumps({**cut, "id": "v", "start": 0.5, "duration": 0.25})
    )
    assert [row.stated_duration for row in read_all(f"cuts:{tmp_path}/c.jsonl")] == [1.0, None]
    (tmp_path / "wav.scp").write_text("u a.wav\nv a.wav\n")
    (tmp_path / "text").write_text("u a\nv a\n")
    (tmp_path / "utt2dur").write_text("u 2.5\n")
    assert [row.stated_duration for row in read_all(f"kaldi:{tmp_path}")] == [2.5, None]


def test_a_large_corpus_of_another_shape_is_left_to_the_index_job(tmp_path: Path) -> None:
    """Reading it anew at each start would take too long."""
    lines = ["audio,text", *("a.wav,one" for _ in range(4001))]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    with pytest.raises(ManifestError) as caught:
        build_index([str(tmp_path / "m.csv")])
    assert f"omni index --source {tmp_path}/m.csv " in str(caught.value)


@pytest.mark.parametrize("cached", [True, False])
def test_a_small_corpus_is_taken_directly_and_kept_beside_the_cache(
    cached: bool, folder: Path, rows: Rows, expected: Expected, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    spec = write_csv(folder, rows, tmp_path / "in")
    cache = tmp_path / "cache" if cached else None
    parts = []
    for _ in range(2):
        found = build_index([spec], cache_dir=cache, allow_absolute=True)
        same(found, expected.index, True, True)
        parts.append({p: p.stat().st_mtime_ns for p in tmp_path.glob("cache/indexes/*/parts/*")})
    assert len(parts[0]) == cached and parts[0] == parts[1], "it is read again when it changes only"
    text = Path(spec).read_text()
    Path(spec).write_text(text.replace(rows[0]["text"], "Something else."))
    assert "Something else." in build_index([spec], cache_dir=cache, allow_absolute=True).table[
        "text"
    ].to_pylist()  # fmt: skip


@pytest.mark.parametrize("row", [CUT, {"audio_filepath": "a.wav", "text": "a"}])
def test_training_names_the_job_that_reads_other_rows(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(ManifestError, match=r"m\.jsonl:1: field 'audio'.*`omni index`"):
        build_index([f"{tmp_path}/m.jsonl"])


def test_a_conversation_stays_one(folder: Path, rows: Rows, tmp_path: Path) -> None:
    shutil.copytree(folder / "clips", tmp_path / "clips")
    content = [{"audio": row["audio"]} for row in rows[:2]]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Two recordings."},
    ]
    manifest = tmp_path / "talk.jsonl"
    manifest.write_text(json.dumps({"id": "talk", "messages": messages}) + "\n")
    plain = build_index([str(manifest)])
    found = index(tmp_path / "out", str(manifest))
    assert found.table.drop_columns("uri") == plain.table.drop_columns("uri")
    assert found.fingerprint == plain.fingerprint


# -- what is wrong with them -----------------------------------------------------------------------


def test_damaged_recordings_are_rejects(folder: Path, rows: Rows, tmp_path: Path) -> None:
    good = (folder / rows[0]["audio"]).read_bytes()
    audio = [good, b"no sound at all", good[:40], None, good, good]
    texts = ["a", "b", "c", "d", "  ", None]
    ids = list("abcdef")
    pq.write_table(pa.table({"id": ids, "audio": audio, "text": texts}), tmp_path / "x.parquet")
    found = index(tmp_path / "out", str(tmp_path / "x.parquet"))
    assert found.table["id"].to_pylist() == ["a"]
    assert [(r.id, r.reason) for r in found.rejects] == [
        ("b", "unreadable"),
        ("c", "unreadable"),
        ("d", "missing"),
        ("e", "empty text"),
        ("f", "empty text"),
    ]
    [kept] = (tmp_path / "out" / "audio").iterdir()
    assert kept.read_bytes() == good


def _text(name: str, content: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    return write


def _kaldi(segments: str | None = None, scp: str = "u a.wav\n") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "wav.scp").write_text(scp)
        (folder / "text").write_text("u hello\n")
        if segments is not None:
            (folder / "segments").write_text(segments)
        return str(folder)

    return write


def _parquet(**columns: list[Any]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return str(folder / "x.parquet")

    return write


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (_text("m.jsonl", '{"audio": "a.wav", "text": "a"}\n{"audio'), r"m\.jsonl:2: .*JSON"),
        (_text("m.jsonl", "[1]"), r"m\.jsonl:1: .*'\[1\]'"),
        (_text("m.jsonl", '{"audio": "a.wav", "said": "a"}'),
         r"m\.jsonl:1: .*'text'.*\bsentence\b.*--text_column.*\baudio, said\b"),
        (_text("m.jsonl", '{"audio": "../a.wav", "text": "a"}'), r"m\.jsonl:1: .*'\.\./a\.wav'"),
        (_text("m.jsonl", '{"audio": "a.wav", "text": 7}'), r"m\.jsonl:1: .*'text'.*\b7\b"),
        (_text("m.csv", "audio,text\na.wav,a,b\n"), r"m\.csv:2: .*\b2\b.*\baudio, text\b.*\b3\b"),
        (_text("m.csv", 'audio,text\n"a.wav,a\n'), r"m\.csv\b.*CSV"),
        (_text("m.csv", "audio,text,offset\na.wav,a,soon\n"), r"m\.csv:2: .*'offset'.*'soon'"),
        (_text("m.parquet", "no table"), r"m\.parquet: .*Parquet"),
        (_parquet(audio=["a.wav"], words=["a"]), r"x\.parquet:1: .*'text'"),
        (_parquet(audio=["a.wav"], text=[5]), r"x\.parquet:1: .*'text'.*\b5\b"),
        (_parquet(audio=[[0.5, 0.1]], text=["a"]), r"x\.parquet:1: .*'audio'.*\blist\b"),
        (_parquet(audio=[{"array": [0.1]}], text=["a"]), r"x\.parquet:1: .*'audio'.*\barray\b"),
        (_parquet(audio=["/etc/passwd"], text=["a"]), "'/etc/passwd'.*--allow_absolute"),
        (_text("m.tar", "no tar"), r"m\.tar: .*\btar\b"),
        (_kaldi(scp="u sox a.wav -t wav - |\n"), r"wav\.scp:1: .*'sox a\.wav -t wav - \|'"),
        (_kaldi(scp="u /a.wav\n"), r"wav\.scp:1: .*'/a\.wav'"),
        (_kaldi(segments="u rec 0.0 1.0\n"), r"segments:1: .*'rec'.*wav\.scp"),
        (_kaldi(segments="u u 1.0\n"), "segments:1: .*UTTERANCE RECORDING START END"),
        (_kaldi(segments="u u 2.0 1.0\n"), "segments:1: .*START < END"),
        (_text("c.jsonl", json.dumps({**CUT, "recording": FILE, "duration": None})),
         r"c\.jsonl:1: .*'duration'"),
        (_text("c.jsonl", json.dumps({**CUT, "recording": FILE, "id": 7})),
         r"c\.jsonl:1: .*'id'.*\b7\b"),
        (_text("c.jsonl", json.dumps({**CUT, "recording": {"sources": 3}})),
         r"c\.jsonl:1: .*'recording\.sources'"),
        (_text("m.xyz", ""), r"m\.xyz: .*\bjsonl:, csv:"),
        (lambda folder: str(folder / "nothing.jsonl"), r"nothing\.jsonl\b"),
        (lambda folder: str(folder), r"/in\b"),
        (lambda folder: f"hf:{folder}", "^hf:/.*/in: "),
        (lambda folder: "hf:a:b:c:d", r"\ba:b:c:d: .*\[:config\]\[:split\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(
    write: Callable[[Path], str], named: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    spec = write(tmp_path / "in")
    with pytest.raises(ManifestError, match=named):
        read_all(spec)


def test_an_empty_source_has_no_rows(tmp_path: Path) -> None:
    assert read_all(_text("m.jsonl", "")(tmp_path)) == []


def test_an_id_that_occurs_twice_names_both_places(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    both = [str(folder / "corpus.jsonl"), str(copy / "corpus.jsonl")]
    with pytest.raises(ManifestError) as caught:
        index(tmp_path / "out", *both)
    assert "'u0000'" in str(caught.value)
    assert all(name in str(caught.value) for name in both)
    assert len(index(tmp_path / "other", *both, number_ids=True)) == 2 * ROWS


# -- an index is a manifest ------------------------------------------------------------------------


@pytest.fixture
def built(folder: Path, rows: Rows, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    index(tmp_path / "built", write_parquet_bytes(folder, rows, tmp_path / "in"))
    return tmp_path / "built"


def test_an_index_moves_with_its_recordings(built: Path, expected: Expected) -> None:
    moved = built.rename(built.with_name("elsewhere"))
    shutil.rmtree(built.parent / "in")
    audio = audio_of(build_index([str(moved)]))
    for one, other in zip(audio, expected.audio, strict=True):
        assert np.array_equal(one, other)


def test_parts_of_an_older_version_stand_beside_new_ones(built: Path, expected: Expected) -> None:
    """Offsets of strings had 32 bits before."""
    first = next((built / "parts").iterdir())
    table = pq.read_table(first)
    old = pa.schema(
        [f.with_type(pa.string()) if pa.types.is_large_string(f.type) else f for f in table.schema],
        table.schema.metadata,
    )
    assert old != table.schema
    pq.write_table(table.cast(old), first)
    same(build_index([str(built)]), expected.index, True, True)


def test_an_index_stands_beside_manifests(built: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    shutil.copytree(folder / "clips", tmp_path / "more" / "clips")
    line = json.dumps({"audio": "clips/0000.flac", "text": "more", "prompt": "Write:"})
    (tmp_path / "more" / "m.jsonl").write_text(line)
    found = build_index([str(tmp_path / "more" / "m.jsonl"), str(built)], prompt="Listen:")
    assert len(found) == ROWS + 1
    assert found.table["prompt"].to_pylist() == ["Write:"] + ROWS * ["Listen:"]
    with pytest.raises(ManifestError, match="'u0000'"):
        build_index([str(built), str(built)])


@pytest.mark.parametrize(
    "damage",
    [
        lambda built: (built / "index.json").write_text("{"),
        lambda built: (built / "index.json").write_text('{"version": 99}'),
        lambda built: next((built / "parts").iterdir()).unlink(),
        lambda built: next((built / "parts").iterdir()).write_bytes(b"PAR1"),
        lambda built: pq.write_table(pa.table({"id": ["a"]}), next((built / "parts").iterdir())),
        lambda built: (built / "rejects.jsonl").write_text("[]\n"),
    ],
)
def test_a_damaged_index_is_one_error(damage: Callable[[Path], Any], built: Path) -> None:
    damage(built)
    with pytest.raises(ManifestError, match="/built: .*damaged"):
        build_index([str(built)])


@pytest.mark.parametrize("annotated", [False, True])
def test_an_unfinished_index_is_no_manifest(built: Path, annotated: bool) -> None:
    (built / "index.json").unlink()
    if annotated:  # It had an index of its corpus, and no labels yet.
        (built / "measured").mkdir()
        (built / "source").mkdir()
        (built / "parts").rename(built / "source" / "parts")
    with pytest.raises(ManifestError, match=r"/built: .*\bindex\.json\b"):
        build_index([str(built)])


def test_a_part_is_there_whole_or_not_at_all(folder: Path, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    options = Options(rows_per_part=7)
    source = open_source(write_parquet_bytes(folder, rows, tmp_path / "in"), options)
    part = source.parts()[0]
    out = tmp_path / "out"
    assert about_part(out, part_name(source, part)) is None
    write_part(source, part, options, out)
    name = part_name(source, part)
    about = about_part(out, name)
    assert about is not None and about["fingerprint"] == fingerprint(part, options)
    with (out / "audio" / f"{name}.bin").open("ab") as file:
        file.truncate(100)
    assert about_part(out, name) is None
    assert list(out.glob("*/*.tmp")) == []


def test_a_range_of_bytes_is_a_file(tmp_path: Path) -> None:
    data = os.urandom(1000)
    (tmp_path / "x").write_bytes(data)
    with ByteRange(str(tmp_path / "x"), 100, 200) as file:
        assert file.read(10) == data[100:110] and file.tell() == 10
        assert file.seek(-5, os.SEEK_END) == 195 and file.read() == data[295:300]
        assert file.seek(500) == 500 and file.read(1) == b""
    with ByteRange(str(tmp_path / "x"), 900, 200) as file:
        assert file.read() == data[900:], "an archive that was cut short"


def test_a_long_recording_in_an_archive_is_read_in_part(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, 16_000 * 200, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    (tmp_path / "long.json").write_text('{"text": "a", "offset": 150.0, "duration": 2.0}')
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("long.wav", "long.json"):
            tar.add(tmp_path / name, name)
    [audio] = audio_of(index(tmp_path / "out", str(tmp_path / "x.tar")))
    assert np.array_equal(audio, samples[2_400_000:2_432_000] / np.float32(32768))


def test_streamed_wavs_in_an_ark_do_not_hold_their_neighbours(tmp_path: Path) -> None:
    """Kaldi's programs write sizes of 0xFFFFFFFF where a WAV comes out of a pipe."""
    ark, scp = b"", ""
    for number in range(3):
        file = io.BytesIO()
        soundfile.write(file, np.linspace(-0.5, 0.5, 4_000 * (number + 1)), 16_000, format="WAV")
        data = bytearray(file.getvalue())
        data[4:8] = data[40:44] = b"\xff" * 4
        ark += f"utt{number} ".encode()
        scp += f"utt{number} wav.ark:{len(ark)}\n"
        ark += data
    (tmp_path / "wav.ark").write_bytes(ark)
    (tmp_path / "wav.scp").write_text(scp)
    (tmp_path / "text").write_text("".join(f"utt{number} hello\n" for number in range(3)))
    source = open_source(f"kaldi:{tmp_path}", Options())
    found = [row for part in source.parts() for row in source.read(part)]
    measured = measure_rows([vars(row) for row in found])
    assert [m["samples"] for m in measured if isinstance(m, dict)] == [4_000, 8_000, 12_000]
