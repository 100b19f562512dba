"""Recordings of several tasks are encoded once, and figures are those of encoding each time."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from omni.corpus.index import build_index
from omni.corpus.tasks import task_rules
from omni.corpus.text import TextPolicy
from omni.inference.rows import evaluate, tagger, transcribe_rows
from omni.inference.shards import Decoder, Shard, load_rows, read_shard, transcribe_shard
from omni.inference.transcriber import Transcriber
from omni.model.decode import Decoding
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.speech_lm import OmniModel
from tests.helpers.long_recordings import ASSETS
from tests.helpers.small_gpt import awaken

ROWS = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()][:5]
TASKS = {
    "length": {
        "prompt": "Long or short?",
        "answer": "{{ 'long' if seconds > 1.6 else 'short' }}",
        "choices": ["long", "short"],
    },
    "half": {
        "prompt": "Which half?",
        "answer": "{{ 'first' if seconds > 2 else 'second' }}",
        "choices": ["first", "second"],
    },
}


@pytest.fixture(scope="module")
def awake(speech: Transcriber) -> Transcriber:
    """A model that writes something else about each recording."""
    model = OmniModel(speech.model.config).eval()
    awaken(model)
    return dataclasses.replace(speech, model=model)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count the recordings that are encoded, by their samples."""
    counts: Counter[int] = Counter()
    plain = WhisperEncoder.encode

    def counted(self: WhisperEncoder, audio: Any) -> Any:
        counts.update(map(len, audio))
        return plain(self, audio)

    monkeypatch.setattr(WhisperEncoder, "encode", counted)
    return counts


def _manifest(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "manifest.jsonl"
    lines = [json.dumps({**row, "audio": str(ASSETS / row["audio"])}) + "\n" for row in rows]
    path.write_text("".join(lines))
    return str(path)


def test_each_recording_is_encoded_once_and_scored_as_ever(
    awake: Transcriber, tmp_path: Path, encoded: Counter[int]
) -> None:
    manifest = _manifest(tmp_path, ROWS)
    asked = dataclasses.replace(
        awake, tasks=task_rules({"tasks": TASKS}), decoding=Decoding(max_new_tokens=4)
    )
    once = evaluate(asked, manifest, allow_absolute=True)
    assert sum(encoded.values()) == len(ROWS)
    encoded.clear()
    # Transcribed elsewhere, as by a cluster, without a cache: everything is encoded again.
    again = evaluate(
        asked, manifest, allow_absolute=True, run=lambda table: transcribe_rows(asked, table)
    )
    assert sum(encoded.values()) == 4 * len(ROWS)
    assert once == again and once[0]["tasks"]["length"]["decided_by"] == "likelihood"
    assert len(once[1]) == 3 * len(ROWS)
    of_length = [row["choices"]["long"] for row in once[1] if row["task"] == "length"]
    assert len(set(of_length)) == len(ROWS)
    encoded.clear()
    cache = str(tmp_path / "cache")
    assert evaluate(asked, manifest, allow_absolute=True, cache=cache) == once
    assert evaluate(asked, manifest, allow_absolute=True, cache=cache) == once
    assert sum(encoded.values()) == len(ROWS), "the second time from the cache"


def test_a_row_that_is_refused_leaves_the_others_their_recordings(
    awake: Transcriber, tmp_path: Path
) -> None:
    rows = [{**row, "language": "en"} for row in ROWS[:3]]
    table = build_index([_manifest(tmp_path, rows)], allow_absolute=True).table
    languages = ["e n", "en", "en"]  # As an index of another program may have.
    at = table.schema.get_field_index("language")
    table = table.set_column(
        at,
        table.schema.field(at),
        pa.chunked_array([pa.array(languages, table.schema.field(at).type)]),
    )
    policy, decoding = TextPolicy(language_tag=True), Decoding(max_new_tokens=6)
    tagged = dataclasses.replace(awake, policy=policy, decoding=decoding)
    expected = [found for _, found in transcribe_rows(tagged, table, tagger(tagged, None))]
    loaded = load_rows(table.to_pylist(), tagged.longest_piece, None)
    path = tmp_path / "000000.jsonl"
    made = transcribe_shard(tagged, table, loaded, Decoder(""), None, path)
    assert (made["rows"], made["errors"]) == (3, 1)
    found = [transcript for _, transcript in read_shard(Shard(0, 3, 1.0, path))]
    assert isinstance(found[0], ValueError) and isinstance(expected[0], ValueError)
    assert found[1:] == expected[1:] and found[1] != found[2]
