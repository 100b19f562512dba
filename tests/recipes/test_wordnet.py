"""Sentences of WordNet: what is cleaned, what is left out and why, and what is held out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omni.errors import ConfigError, ManifestError
from omni.metrics.score import normalize
from omni.recipes.exclusion import HELD_OUT, Exclusion, read_texts
from omni.recipes.wordnet import FILES, clean, licence_of, read_glosses, select_sentences

pytestmark = pytest.mark.unit
NOBODY = Exclusion([])


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [
        ("an entity that can cast a shadow", "An entity that can cast a shadow."),
        ("(botany) of or relating to a root (or roots) ", "Of or relating to a root."),
        ("I know this voice!", "I know this voice!"),
        ("where are you , then ?", "Where are you, then?"),
        ("he left -- and came back", "He left, and came back."),
        ("a pawn's well-known move.", "A pawn's well-known move."),
        ("soft, mild weather,", "Soft, mild weather."),
    ],
)
def test_a_sentence_gets_a_capital_and_a_full_stop(piece: str, sentence: str) -> None:
    assert clean(piece) == (sentence, "")


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("two words", "fewer words"),
        ("word " * 23, "more words"),
        ("born in 1944 in Paris", "digits"),
        ("the so-called `magic' lamp", "other characters"),
        ("a price of many £", "other characters"),
        ("an unclosed (remark about it", "other characters"),
        ("a tool, e.g. a hammer", "abbreviations"),
        ("forks, knives, spoons etc.", "abbreviations"),
        ("the NATO summit meeting", "words that are spelt"),
        ("the letter b is here", "words that are spelt"),
        ("well... who knows that", "runs of punctuation"),
        ("", "fewer words"),
    ],
)
def test_what_no_voice_reads_as_written_is_left_out(piece: str, reason: str) -> None:
    assert clean(piece) == ("", reason)


@pytest.mark.parametrize("piece", ["word " * 3, "word " * 22, "I am a man", "O what a day it is"])
def test_three_to_twenty_two_words_and_words_of_one_letter_are_kept(piece: str) -> None:
    assert clean(piece)[1] == ""


def test_definitions_and_examples_are_sentences_once() -> None:
    glosses = [
        'a tangible entity; one that casts a shadow (as a tree; or a wall); "full of red balls"',
        'A tangible entity!; "Full of red balls."; "it is short"- Shakespeare; ""',
    ]
    found = select_sentences(glosses, NOBODY)
    assert found.texts == [
        "A tangible entity.", "One that casts a shadow.", "Full of red balls.", "It is short.",
    ]  # fmt: skip
    assert found.left_out == {"repeated": 2, "fewer words": 1}


# -- held-out texts ------------------------------------------------------------------------------


def test_held_out_sentences_are_left_out_however_they_are_written() -> None:
    held = Exclusion(
        ["The conference is now muted.", "It's the grey colour of 20 clouds", "Thanks."]
    )
    assert held.count == 3
    for text in (
        "the CONFERENCE is now, muted!",
        "It is the gray color of twenty clouds.",
        "Conference is now.",  # a run of its words
        "The gray color!",
        "Thanks.",
    ):
        assert held.has(text), text
    for text in (
        "The conference is muted.",
        "Now the conference is now muted.",  # longer: another sentence
        "A conference is now muted.",
        "Encounter forms.",
        "",
    ):
        assert not held.has(text), text
    found = select_sentences(["the conference is now muted; a grey colour of clouds"], held)
    assert (found.texts, found.left_out) == (["A grey colour of clouds."], {"excluded": 1})


def test_the_quick_check_of_words_changes_no_answer() -> None:
    texts = list(read_texts(HELD_OUT))
    held = Exclusion(texts)
    runs = [" ".join(t.split()[i : i + 4]) for t in texts for i in range(len(t.split()))]
    others = [f"{run} unmistakably" for run in runs] + ["one hundred percent of fifteen"]
    joined = "".join(f"\n {normalize(text)} \n" for text in texts)
    for text in [*texts, *runs, *others]:
        assert held.has(text) == (bool(normalize(text)) and f" {normalize(text)} " in joined), text


def test_texts_of_a_corpus_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text('{"audio": "../a.wav", "text": "outside of its folder"}\n')
    assert list(read_texts([str(path)])) == ["outside of its folder"]
    path.write_text('{"audio": "gopher://a/b.wav", "text": "unknown"}\n')
    with pytest.raises(ManifestError, match="cannot be left out: address"):
        list(read_texts([str(path)]))
    path.write_text("")
    with pytest.raises(ManifestError, match=re.escape(str(path))):
        list(read_texts([str(path)]))


# -- files ---------------------------------------------------------------------------------------


def write_wordnet(folder: Path, glosses: list[str]) -> Path:
    """Write files as WordNet has them: a licence, then a synset per line."""
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text("  1 This software is free.  \n  2 Keep this notice.  \n")
    with (folder / FILES[0]).open("a") as file:
        for number, gloss in enumerate(glosses):
            file.write(f"{number:08} 03 n 01 thing 0 000 | {gloss}  \n")
    return folder


def test_glosses_and_the_licence_come_from_its_files(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path, ["a thing", 'another; "an example"'])
    assert list(read_glosses(folder)) == ["a thing", 'another; "an example"']
    assert licence_of(folder) == "This software is free.\nKeep this notice.\n"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path, ["a thing"])
    (folder / "data.verb").write_text("00000001 29 v 01 be 0 000 | exist  \nno gloss here\n")
    with pytest.raises(ConfigError, match=r"data\.verb:2: "):
        list(read_glosses(folder))
    (folder / "data.verb").unlink()
    with pytest.raises(ConfigError, match=r"data\.verb .* wordnet-base"):
        list(read_glosses(folder))
