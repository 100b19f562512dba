"""Long recordings in an index: spans of speech where there is no text, times where there are."""

from __future__ import annotations

import json
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

from omni.audio.decode import decode
from omni.audio.vad import Segmenting, speech_spans
from omni.corpus.build_part import write_part
from omni.corpus.built_index import finish, summary_lines
from omni.corpus.index import Index, build_index, read_index_folder
from omni.corpus.index_row import span_of
from omni.corpus.manifest import ManifestError
from omni.corpus.sources import Options, open_source
from tests.helpers.long_recordings import write_long

HOW = Segmenting(longest=20.0)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A talk of a minute, a short one, a minute of silence, and a short one with a text."""
    folder = tmp_path_factory.mktemp("talks")
    write_long(folder / "long.flac", 1, pauses=(1.0,))
    write_long(folder / "short.flac", 0.1)
    write_long(folder / "said.flac", 0.1)
    (folder / "said.txt").write_text("activated\n")
    soundfile.write(folder / "silence.flac", np.zeros(25 * 16_000), 16_000)
    return folder


def index(out: Path, spec: str, **options: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """What jobs.index does with a source, without Ray: rows, rejects and counts."""
    given = Options(**{"segment": HOW, **options})
    source = open_source(spec, given)
    tasks = [(source, part) for part in source.parts()]
    for source, part in tasks:
        write_part(source, part, given, out)
    counts = finish(tasks, out)
    table, rejects = read_index_folder(out)
    return table.to_pylist(), rejects, counts


@dataclass(frozen=True)
class Built:
    out: Path
    rows: Any
    rejects: list[Any]
    counts: dict[str, Any]


@pytest.fixture(scope="module")
def built(talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("built")
    return Built(out, *index(out, f"folder:{talks}"))


@pytest.fixture(scope="module")
def expected(talks: Path) -> list[tuple[float, float]]:
    return speech_spans(talks / "long.flac", HOW)


def test_a_long_recording_becomes_its_spans_of_speech(
    talks: Path, built: Built, expected: list[tuple[float, float]]
) -> None:
    spans = [row for row in built.rows if row["uri"].endswith("long.flac")]
    assert len(expected) > 5
    assert [(row["start"], row["duration"]) for row in spans] == expected
    whole = decode(talks / "long.flac")
    for row, (start, duration) in zip(spans, expected, strict=True):
        audio = decode(row["uri"], span_of(row))
        first = round(start * 16_000)
        assert np.array_equal(audio, whole[first : first + len(audio)])
        assert len(audio) == row["samples"] == round(duration * 16_000)
        times = f"{round(1000 * start):08}-{round(1000 * (start + duration)):08}"
        assert row["id"] == f"long-{times}"
    others = {row["id"]: (row["text"], row["duration"]) for row in built.rows if row not in spans}
    assert others == {"short": ("", None), "said": ("activated", None)}
    assert [(r.id, r.reason) for r in built.rejects] == [("silence", "silent")]
    assert built.counts["without_text"] == len(expected) + 1 and sum(built.counts["texts"]) == 1
    [line] = [line for line in summary_lines(built.counts) if "no text" in line]
    assert f" {len(expected) + 1}:" in line


def test_training_takes_what_has_a_text_and_says_why_not_the_rest(built: Built) -> None:
    found: Index = build_index([str(built.out)])
    assert found.table["id"].to_pylist() == ["said"]
    reasons = [reject.reason for reject in found.rejects]
    assert sorted(reasons) == (len(built.rows) - 1) * ["no text"] + ["silent"]


def test_an_index_without_any_text_is_not_for_training(talks: Path, tmp_path: Path) -> None:
    shutil.copy(talks / "short.flac", tmp_path / "talk.flac")
    _, _, counts = index(tmp_path / "out", f"folder:{tmp_path}")
    assert "characters" not in "\n".join(summary_lines(counts))
    with pytest.raises(ManifestError, match=r"\btalk: no text: "):
        build_index([str(tmp_path / "out")])


# -- writers: each puts the long recording where it has no file of its own, or no text column ------


def write_jsonl(talk: Path, to: Path) -> str:
    shutil.copy(talk, to / talk.name)
    (to / "m.jsonl").write_text(json.dumps({"audio": talk.name, "id": "talk"}))
    return str(to / "m.jsonl")


def write_csv(talk: Path, to: Path) -> str:
    shutil.copy(talk, to / talk.name)
    (to / "m.csv").write_text(f"id,audio,text\ntalk,{talk.name},\n")
    return str(to / "m.csv")


def write_parquet(talk: Path, to: Path) -> str:
    clip = talk.with_name("short.flac").read_bytes()
    table = pa.table({"id": ["clip", "talk"], "audio": [clip, talk.read_bytes()]})
    pq.write_table(table, to / "m.parquet")
    return str(to / "m.parquet")


def write_tar(talk: Path, to: Path) -> str:
    (to / "talk.json").write_text('{"speaker": "s"}')
    with tarfile.open(to / "m.tar", "w") as tar:
        tar.add(talk, "talk.flac")
        tar.add(to / "talk.json", "talk.json")
    return str(to / "m.tar")


def write_kaldi(talk: Path, to: Path) -> str:
    shutil.copy(talk, to / talk.name)
    (to / "wav.scp").write_text(f"talk {talk.name}\n")
    return str(to)


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet, write_tar, write_kaldi])
def test_long_recordings_are_cut_wherever_they_lie(
    write: Callable[[Path, Path], str],
    talks: Path,
    expected: list[tuple[float, float]],
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    rows, rejects, _ = index(tmp_path / "out", write(talks / "long.flac", tmp_path / "in"))
    spans = [row for row in rows if row["id"] != "clip"]
    assert rejects == []
    assert [(row["start"], row["duration"]) for row in spans] == expected
    whole = decode(talks / "long.flac")
    last = decode(spans[-1]["uri"], span_of(spans[-1]))
    first = round(spans[-1]["start"] * 16_000)
    assert np.array_equal(last, whole[first : first + len(last)])
    kept = sum(file.stat().st_size for file in (tmp_path / "out" / "audio").glob("*.bin"))
    files = [talks / f"{name}.flac" for name in ("long", "short")]
    assert kept == (sum(f.stat().st_size for f in files) if write is write_parquet else 0)


def test_given_times_are_taken_and_one_text_for_all_is_not(talks: Path, tmp_path: Path) -> None:
    shutil.copy(talks / "long.flac", tmp_path / "long.flac")
    rows = [
        {"id": "timed", "text": "a", "offset": 0.5, "duration": 25.0},
        {"id": "part", "text": "", "offset": 10.0, "duration": 30.0},
        {"id": "brief", "text": "", "offset": 10.0, "duration": 3.0},
        {"id": "whole", "text": "all that is said in it"},
    ]
    lines = [json.dumps({**row, "audio": "long.flac"}) + "\n" for row in rows]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    found, rejects, _ = index(tmp_path / "out", str(tmp_path / "m.jsonl"))
    spans = [row for row in found if row["id"].startswith("part-")]
    assert [row["id"] for row in found if row not in spans] == ["timed", "brief"]
    assert len(spans) > 2, "a given span that is long and has no text is cut as well"
    assert all(10 <= row["start"] < row["start"] + row["duration"] <= 40 for row in spans)
    [reject] = rejects
    assert (reject.id, reject.reason) == ("whole", "needs segments")
    assert "offset" in reject.detail and "duration" in reject.detail
    assert "20 s" in reject.detail and "--longest_seconds" in reject.detail


def test_a_text_that_is_written_anew_keeps_no_recording_from_being_cut(
    talks: Path, tmp_path: Path
) -> None:
    shutil.copy(talks / "long.flac", tmp_path / "long.flac")
    row = {"id": "whole", "text": "all that is said in it", "audio": "long.flac"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    spec = str(tmp_path / "m.jsonl")
    found, rejects, _ = index(tmp_path / "cut", spec, rewrite_texts=True)
    assert not rejects and len(found) > 2
    assert all(row["id"].startswith("whole-") and row["text"] == "" for row in found)
    short = Segmenting(longest=3.0)
    row["audio"] = "said.flac"
    shutil.copy(talks / "said.flac", tmp_path / "said.flac")
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    found, rejects, _ = index(tmp_path / "kept", spec, rewrite_texts=True, segment=short)
    assert not rejects and [row["id"] for row in found] == ["whole"], "an utterance of its own"
    with pytest.raises(ManifestError, match="needs segments"):
        index(tmp_path / "refused", spec, segment=short)
    assert Options(rewrite_texts=True).fingerprint != Options().fingerprint


def test_without_the_option_all_is_as_before(talks: Path, tmp_path: Path) -> None:
    _, rejects, counts = index(tmp_path / "out", f"folder:{talks}", segment=None)
    assert {reject.reason for reject in rejects} == {"no text"} and counts["utterances"] == 1
    assert Options().fingerprint == Options(rows_per_part=3).fingerprint
    assert Options().fingerprint != Options(segment=HOW).fingerprint
    assert Options(segment=HOW).fingerprint != Options(segment=Segmenting()).fingerprint


def test_a_column_that_was_named_must_be_there(talks: Path, tmp_path: Path) -> None:
    spec = write_jsonl(talks / "long.flac", tmp_path)
    with pytest.raises(ManifestError, match=r"'text'.*\bsaid\b"):
        index(tmp_path / "out", spec, columns={"text": "said"})
