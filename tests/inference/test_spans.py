"""A long recording, and an index without texts, are written down span by span, with times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.audio.vad import Segmenting, speech_spans
from omni.corpus.build_part import write_part
from omni.corpus.built_index import finish
from omni.corpus.index import build_index
from omni.corpus.sources import Options, open_source
from omni.errors import ConfigError
from omni.inference.rows import transcribe_index
from omni.inference.spans import transcribe_speech
from omni.inference.transcriber import Transcriber
from tests.helpers.long_recordings import write_long


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "talk.flac"
    write_long(path, 0.5)
    return path


def make_index(talk: Path, out: Path) -> None:
    options = Options(segment=Segmenting(longest=8.0), language="en")
    source = open_source(f"folder:{talk.parent}", options)
    tasks = [(source, part) for part in source.parts()]
    write_part(*tasks[0], options, out)
    finish(tasks, out)


def test_every_span_of_speech_is_a_line_with_its_times(speech: Transcriber, talk: Path) -> None:
    nothing = str(talk.with_name("none.wav"))
    *rows, last = transcribe_speech(speech, [str(talk), nothing])
    spans = [(row["offset"], row["duration"]) for row in rows]
    assert spans == speech_spans(talk, Segmenting(longest=8.0)) and len(spans) > 5
    assert {row["audio"] for row in rows} == {str(talk)}
    assert len({row["text"] for row in rows}) > 1, "each span is heard for itself"
    assert last.keys() == {"audio", "error"} and last["audio"] == nothing
    assert last["error"].startswith("missing: ") and nothing in last["error"]


def test_an_index_without_texts_becomes_a_manifest(
    speech: Transcriber, talk: Path, tmp_path: Path
) -> None:
    make_index(talk, tmp_path / "out")
    lines = list(transcribe_index(speech, str(tmp_path / "out")))
    spans = list(transcribe_speech(speech, [str(talk)]))
    places = ("audio", "offset", "duration", "text", "cut", "decoder", "alone")
    assert [{k: row[k] for k in places if k in row} for row in lines] == spans
    assert any("cut" in row for row in lines), "a model that has learnt nothing does not end"
    assert all(row["language"] == "en" for row in lines)
    for row in lines:  # A model that has learnt nothing may write NUL, which no text may hold.
        row["text"] = row["text"].replace("\0", "")
    (tmp_path / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = build_index([str(tmp_path / "written.jsonl")], allow_absolute=True)
    assert found.table["id"].to_pylist() == [row["id"] for row in lines if row["text"].strip()]


def test_a_recording_that_is_gone_is_a_line_too(
    speech: Transcriber, talk: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "in" / "talk.flac"
    copy.parent.mkdir()
    copy.write_bytes(talk.read_bytes())
    make_index(copy, tmp_path / "out")
    copy.unlink()
    lines = list(transcribe_index(speech, str(tmp_path / "out")))
    assert len(lines) > 5 and all(row["error"].startswith("unreadable: ") for row in lines)


def test_a_folder_that_is_no_index_is_refused(speech: Transcriber, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}: .*\bindex\.json\b"):
        list(transcribe_index(speech, str(tmp_path)))
