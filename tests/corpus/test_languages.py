"""Languages by whatever name a corpus gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.config import load_config
from omni.corpus.languages import is_known, language_code, unknown_languages
from omni.corpus.splits import build_indexes
from omni.metrics.score import by_characters, count_errors
from tests.corpus.test_sources import make_corpus


@pytest.mark.parametrize(
    "given, code",
    [
        ("fr_FR.UTF-8", "fr"), ("ZH-hant-TW", "zh"), ("cmn", "zh"), ("Thai", "th"), ("", ""),
        ("Mandarin Chinese", "zh"), ("Cantonese Chinese", "yue"), ("Chinese (Taiwan)", "zh"),
        ("Simplified Chinese", "zh"), ("zh-yue", "yue"), ("zh-hak", "hak"), ("Hokkien", "nan"),
        ("中文", "zh"), ("Central Khmer", "km"), ("bur", "my"), ("Brazilian Portuguese", "pt"),
        ("English (US)", "en"), ("cn", "zh"), ("jpn", "ja"), ("arz", "arz"), ("no such", "no such"),
        # As Whisper writes them, though others say fil and jv.
        ("tl", "tl"), ("jw", "jw"),
    ],
)  # fmt: skip
def test_language_codes(given: str, code: str) -> None:
    assert language_code(given) == code


@pytest.mark.parametrize("name", ["0", "unknown", "Elbonian", "und", ""])
def test_names_that_are_no_language(name: str) -> None:
    assert not is_known(name) and not by_characters(name)


@pytest.mark.parametrize(
    "name",
    ["Mandarin Chinese", "Cantonese Chinese", "Chinese (Taiwan)", "Min Dong Chinese", "cjy", "Lao"],
)
def test_names_of_languages_without_spaces_are_scored_by_characters(name: str) -> None:
    assert is_known(name) and count_errors("你好世界", "你好世间", name).words == 4


def test_an_unknown_language_is_one_note(tmp_path: Path) -> None:
    [note] = unknown_languages({"Elbonian": 3, "0": 1, "en": 9, "German": 2, None: 5})
    assert "'Elbonian' (3" in note and "'0' (1" in note and "German" not in note
    assert unknown_languages({"en": 9, None: 5}) == []
    rows = [{**row, "language": "Elbonian"} for row in make_corpus(tmp_path, 2)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--data.train", str(manifest), "--data.dev", "embedded:dev", "--data.cache", "null"]
    found = build_indexes(load_config(None, settings))
    assert [note.startswith("data.train: ") for note in found["train"].notes] == [True]
    assert "'Elbonian' (2" in found["train"].notes[0] and found["dev"].notes == []
