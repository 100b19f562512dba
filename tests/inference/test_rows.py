"""Rows of a manifest or index: long recordings in pieces, cut answers counted, refusals named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from omni.audio.decode import decode, decode_blocks
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.build_part import write_part
from omni.corpus.built_index import finish
from omni.corpus.sources import Options, open_source
from omni.errors import ConfigError
from omni.inference.pieces import cut_at_pauses
from omni.inference.rows import evaluate, transcribe_index
from omni.inference.transcriber import Transcriber, transcribe_files
from omni.model.chat_template import Template, transcription
from omni.model.decode import Decoding
from omni.model.lm.generate import generate
from omni.stream.collate import Utterance
from tests.helpers.chat_families import FAMILIES, speech_tokenizer
from tests.helpers.long_recordings import ASSETS, write_long

SHORT = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()][:3]


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minute") / "minute.flac"
    write_long(path, 0.4, pauses=(0.3,))
    path.with_suffix(".txt").write_text("words")
    return path


def _manifest(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _spoken(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "audio": str(ASSETS / row["audio"])}


def test_a_long_recording_is_cut_alike_wherever_it_is_transcribed(
    speech: Transcriber, minute: Path, tmp_path: Path
) -> None:
    """`evaluate`, `transcribe` of a file and of an index; test_export.py has the exported one."""
    long = {"id": "long", "audio": str(minute), "text": "words"}
    manifest = _manifest(tmp_path, _spoken(SHORT[0]), long, _spoken(SHORT[1]))
    summary, rows = evaluate(speech, manifest, allow_absolute=True)
    pieces = list(cut_at_pauses(decode_blocks(minute), speech.longest_piece))
    assert sum(map(len, pieces)) == len(decode(minute)) > 24 * SAMPLING_RATE
    assert [row["id"] for row in rows] == [SHORT[0]["id"], "long", SHORT[1]["id"]]
    assert [row.get("pieces") for row in rows] == [None, len(pieces), None]
    assert len(pieces) > 2 and summary["in_pieces"] == 1 and summary["rejects"] == {}
    [line] = transcribe_files(speech, [str(minute)])
    assert rows[1]["hypothesis"] == line["text"] != ""
    options = Options()
    source = open_source(f"folder:{minute.parent}", options)
    tasks = [(source, part) for part in source.parts()]
    write_part(*tasks[0], options, tmp_path / "index")
    finish(tasks, tmp_path / "index")
    [indexed] = transcribe_index(speech, str(tmp_path / "index"))
    assert indexed["text"] == line["text"]


def test_a_span_of_a_long_file_is_read_and_cut_by_itself(
    speech: Transcriber, minute: Path, tmp_path: Path
) -> None:
    row = {"id": "s", "audio": str(minute), "text": "x", "offset": 3.0, "duration": 15.0}
    _, [scored] = evaluate(speech, _manifest(tmp_path, row), allow_absolute=True)
    audio = decode(minute)[3 * SAMPLING_RATE : 18 * SAMPLING_RATE]
    found = speech.text_of([audio])
    assert (scored["hypothesis"], scored["pieces"]) == (found.text, found.pieces)


def test_answers_that_reach_the_limit_say_so_and_are_counted(
    speech: Transcriber, minute: Path, tmp_path: Path
) -> None:
    manifest = _manifest(tmp_path, *map(_spoken, SHORT))
    for limit in (2, 5):
        short = dataclasses.replace(speech, decoding=Decoding(max_new_tokens=limit))
        summary, rows = evaluate(short, manifest, allow_absolute=True)
        assert summary["cut"] == 3 and all(row["cut"] is True for row in rows)
        [line] = transcribe_files(short, [str(minute)])
        assert line["cut"] is True
    # A model that ends each answer at once: no answer is cut.
    template = Template(speech.template.tokenizer)
    silent = dataclasses.replace(speech, decoding=Decoding(max_new_tokens=2), template=template)
    features = [silent.utterance([decode(_spoken(SHORT[0])["audio"])], transcription("", ""))]
    template.end = _first_token(silent, features)
    summary, [row] = evaluate(silent, _manifest(tmp_path, _spoken(SHORT[0])), allow_absolute=True)
    assert summary["cut"] == 0 and "cut" not in row and row["hypothesis"] == ""


def _first_token(speech: Transcriber, utterances: Sequence[Utterance]) -> int:
    """The token with which a model that has learnt nothing begins its first answer."""
    prompts, features = [u.prompt for u in utterances], [u.features or () for u in utterances]
    [answer] = generate(speech.model, prompts, features, end=-5, max_new_tokens=1)
    return answer.ids[0]


def test_a_conversation_about_a_long_recording_is_answered_whole(
    speech: Transcriber, minute: Path, tmp_path: Path
) -> None:
    content = [{"audio": str(minute), "duration": 12.0}, {"text": "How many?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Three."},
    ]
    summary, [row] = evaluate(
        speech, _manifest(tmp_path, {"id": "talk", "messages": messages}), allow_absolute=True
    )
    assert summary["long_conversations"] == 1 and summary["in_pieces"] == 0
    assert "pieces" not in row and row["reference"] == "Three."


def test_a_row_that_the_chat_template_refuses_is_named(speech: Transcriber, tmp_path: Path) -> None:
    template = Template(speech_tokenizer(FAMILIES["gemma"]), "chat")
    gemma = dataclasses.replace(speech, template=template)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"audio": _spoken(SHORT[0])["audio"]}]},
        {"role": "assistant", "content": "Three."},
    ]
    manifest = _manifest(tmp_path, {"id": "talk-7", "messages": messages})
    with pytest.raises(ConfigError, match=r"^talk-7 \(.*\): .*System role not supported"):
        evaluate(gemma, manifest, allow_absolute=True)


def test_a_recording_that_has_changed_is_a_reject_and_others_are_scored(
    speech: Transcriber, minute: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.flac"
    copy.write_bytes(minute.read_bytes())
    rows = ({"id": "long", "audio": str(copy), "text": "words"}, _spoken(SHORT[0]))
    manifest = _manifest(tmp_path, *rows)
    good, _ = evaluate(speech, manifest, allow_absolute=True)
    copy.write_bytes(b"no audio")
    bad, scored = evaluate(speech, manifest, allow_absolute=True)
    assert good["rejects"] == {} and bad["rejects"] == {"unreadable": 1}
    assert [row["id"] for row in scored] == [SHORT[0]["id"]]
