"""Error rates: Whisper's normaliser, then edits over words and characters."""

from __future__ import annotations

import pytest

from omni.score import Errors, count_errors, normalize, total


@pytest.mark.parametrize(
    "spoken, written",
    [
        ("Hello, World!", "hello world"),
        ("  two\n lines ", "two lines"),
        ("I don't know", "I do not know"),
        ("We're gonna go.", "we are going to go"),
        ("twenty-five", "25"),
        ("I have three apples", "i have 3 apples"),
        ("twenty five dollars", "$25"),
        ("1,000", "one thousand"),
        ("two point five percent", "2.5%"),
        ("Mr. Smith's colour", "mister smith's color"),
        ("[noise] yes (laughs)", "yes"),
        ("café", "cafe"),
    ],
)
def test_ways_to_write_the_same_words_are_no_error(spoken: str, written: str) -> None:
    assert normalize(spoken) == normalize(written)
    errors = count_errors(spoken, written)
    assert errors.word_errors == errors.char_errors == 0 and errors.words > 0
    assert errors.wer == errors.cer == 0.0


def test_normal_forms() -> None:
    assert normalize("Don't STOP!") == "do not stop"
    assert normalize("Ninety-nine calls") == "99 calls"
    assert normalize("?!") == normalize("") == ""


def test_other_languages_keep_their_words() -> None:
    """English contractions, numbers and spellings mean nothing elsewhere."""
    assert normalize("Größe, drei!", "de") == "größe drei"
    assert normalize("don't, colour", "fr") == "don t colour"
    assert count_errors("Die Hand", "die hand", "de").word_errors == 0
    assert count_errors("three", "3", "nl").word_errors == 1
    assert count_errors("three", "3", "en").word_errors == 0


@pytest.mark.parametrize(
    "reference, hypothesis, words, chars",
    [
        ("the cat sat", "the cat sat", (0, 3), (0, 11)),
        ("the cat sat", "the bat sat", (1, 3), (1, 11)),
        ("the cat sat", "the cat", (1, 3), (4, 11)),
        ("the cat sat", "the cat sat down", (1, 3), (5, 11)),
        ("the cat sat", "", (3, 3), (11, 11)),
        ("hello", "well hello there again", (3, 1), None),
    ],
)
def test_substitutions_deletions_and_insertions_count_one_each(
    reference: str, hypothesis: str, words: tuple[int, int], chars: tuple[int, int] | None
) -> None:
    errors = count_errors(reference, hypothesis)
    assert (errors.word_errors, errors.words) == words
    assert errors.wer == words[0] / words[1]
    if chars is not None:
        assert (errors.char_errors, errors.chars) == chars
        assert errors.cer == chars[0] / chars[1]


@pytest.mark.parametrize("reference", ["", "  ", "?!", "[silence]"])
def test_an_empty_reference_counts_insertions_and_has_no_rate(reference: str) -> None:
    errors = count_errors(reference, "made up words")
    assert errors == Errors(word_errors=3, words=0, char_errors=13, chars=0)
    assert errors.wer is None and errors.cer is None
    assert count_errors(reference, "") == Errors()


def test_counts_add_up_before_they_are_divided() -> None:
    parts = [count_errors("one two three", "one two"), count_errors("a b c d e", "a b c d e")]
    assert total(parts) == parts[0] + parts[1]
    assert total(parts).words == parts[0].words + 5
    assert total(parts).wer == parts[0].word_errors / (parts[0].words + 5)
    assert total([]) == Errors() and total([]).wer is None


def test_words_made_up_in_silence_raise_the_rate_of_the_corpus() -> None:
    assert (count_errors("a b", "a b") + count_errors("", "c")).wer == 0.5
