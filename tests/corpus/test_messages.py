"""Conversations in manifests: several messages, several recordings, one row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.audio.decode import decode
from omni.corpus.index import build_index
from omni.corpus.index_row import recordings, span_of
from omni.corpus.manifest import ManifestError
from omni.corpus.messages import messages_of
from omni.model.chat_template import AUDIO, Message

Record = Callable[..., Path]
Manifest = Callable[..., str]

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"text": "First: "},
            {"audio": "one.wav", "text": "hello"},
            {"text": " and "},
            {"audio": "two.wav", "offset": 0.5, "duration": 0.25},
        ],
    },
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": [{"audio": "one.wav"}]},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def talk(record: Record, manifest: Manifest) -> dict[str, Any]:
    record("one.wav", 1.0)
    record("two.wav", 2.0)
    [row] = build_index([manifest({"id": "t", "messages": TALK})]).table.to_pylist()
    return row


def test_a_conversation_is_one_row_with_all_its_recordings(talk: dict[str, Any]) -> None:
    assert (talk["id"], talk["text"], talk["samples"]) == ("t", "No.", 16_000 + 4_000 + 16_000)
    spoken = recordings(talk)
    assert [Path(r["uri"]).name for r in spoken] == ["one.wav", "two.wav", "one.wav"]
    assert [r["samples"] for r in spoken] == [16_000, 4_000, 16_000]
    assert [r["text"] for r in spoken] == ["hello", None, None]
    assert spoken[0]["key"] == spoken[2]["key"] != spoken[1]["key"], "encoded once"
    part = decode(Path(spoken[1]["uri"]), span_of(spoken[1]))
    whole = decode(Path(spoken[1]["uri"]))
    assert np.array_equal(part, whole[8_000:12_000])


def test_its_messages_come_back(talk: dict[str, Any]) -> None:
    assert messages_of(talk) == [
        Message("system", ("Be brief.",)),
        Message("user", ("First: ", AUDIO, " and ", AUDIO)),
        Message("assistant", ("Yes.",)),
        Message("user", (AUDIO,)),
        Message("assistant", ("No.",)),
    ]


def test_rows_of_both_kinds_share_a_manifest(
    record: Record, manifest: Manifest, talk: dict[str, Any]
) -> None:
    plain = {"audio": "one.wav", "text": "hello", "prompt": "Write:"}
    index = build_index([manifest(plain, {"id": "t", "messages": TALK})])
    first, second = index.table.to_pylist()
    assert second == talk and recordings(first) == [first]
    assert messages_of(first) == [
        Message("user", (AUDIO, "Write:")),
        Message("assistant", ("hello",)),
    ]


def test_other_words_are_another_index(record: Record, manifest: Manifest) -> None:
    record("one.wav")
    record("two.wav", 2.0)
    changed = json.loads(json.dumps(TALK).replace("and", "or"))
    one = build_index([manifest({"id": "t", "messages": TALK})])
    other = build_index([manifest({"id": "t", "messages": changed})])
    assert one.fingerprint != other.fingerprint


def test_a_recording_that_is_missing_rejects_the_conversation(
    record: Record, manifest: Manifest
) -> None:
    record("one.wav")
    other = {"audio": "one.wav", "text": "a"}
    index = build_index([manifest({"id": "t", "messages": TALK}, other)])
    assert [(r.id, r.reason) for r in index.rejects] == [("t", "missing")]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ("hello", "'messages'.*'hello'"),
        ([], "'messages'.*assistant"),
        ([{"role": "user"}], r"message 0\b.*\bcontent\b"),
        ([{"role": "user", "content": 7}], r"message 0\b.*\bcontent\b.*\b7\b"),
        ([{"role": "user", "content": [{"image": "x"}]}], r"message 0\b.*\bcontent\b.*'image'"),
        ([*TALK[:2], {"role": "assistant", "content": ""}], r"message 2\b.*\bempty\b"),
        ([{"role": "user", "content": "a"}, TALK[-1]], "'messages'.*recording"),
        (
            [{"role": "user", "content": [{"audio": "../../etc/passwd"}]}, TALK[-1]],
            r"'\.\./\.\./etc/passwd'",
        ),
        (
            [{"role": "user", "content": [{"audio": "one.wav", "offset": "now"}]}, TALK[-1]],
            "'offset'.*'now'",
        ),
    ],
)
def test_what_is_wrong_is_named(
    messages: object, named: str, record: Record, manifest: Manifest
) -> None:
    record("one.wav")
    record("two.wav", 2.0)
    with pytest.raises(ManifestError, match=named) as caught:
        build_index([manifest({"id": "t", "messages": messages})])
    assert "corpus.jsonl:1: " in str(caught.value)
