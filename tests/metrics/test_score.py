"""Error rates: Whisper's normaliser, then edits over words and characters."""

from __future__ import annotations

from typing import Any

import pytest
from whisper_normalizer.basic import BasicTextNormalizer

from omni.inference.decode_batch import by_language, summarize
from omni.metrics.score import Errors, by_characters, count_errors, normalize, total


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
    assert errors == Errors(word_errors=3, words=0, char_errors=13, chars=0, insertions=3)
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


# -- other languages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "language, reference, hypothesis, words, chars",
    [
        # One character of four is another; brackets, full-width or not, are asides.
        ("zh", "你好，世界！（笑）", "你好 世间", (1, 4), (1, 4)),
        # 我 用 github 写 代 码: six units; a space inside a word is one substitution and one
        # insertion of units, and no character.
        ("zh-CN", "我用GitHub写代码。", "我用Git Hub写代码", (2, 6), (0, 11)),
        ("cmn_Hans_CN", "今天是２０２４年", "今天 是 2024 年", (0, 5), (0, 8)),
        ("ja", "コーヒーを２つ。", "コーヒー を 3 つ", (1, 7), (1, 7)),
        ("ja", "ｶﾞｲﾄﾞ", "ガイド", (0, 3), (0, 3)),
        # ส วั ส ดี ค รั บ: seven clusters, ten code points; one vowel is another.
        ("th", "สวัสดีครับ", "สวัสดิครับ", (1, 7), (1, 10)),
        ("lo", "ສະບາຍດີ", "ສະບາຍ ດີ", (0, 6), (0, 7)),
        # Three words of 6, 3 and 3 code points and two spaces.
        ("hi", "हिन्दी में बात।", "हिन्दी में बात", (0, 3), (0, 14)),
        ("hi", "हिन्दी में बात", "हिन्दी मे बात", (1, 3), (1, 14)),
        ("ru", "Это замо́к, а не за́мок!", "это замок а не замок", (0, 5), (0, 20)),
        ("ru", "Ёлка и йод", "елка и йод", (1, 3), (1, 10)),
        ("fr", "L’été, ça va ?", "l'ete ca va", (2, 4), (3, 11)),
        ("fr", "« Où est-il ? »", "où est il", (0, 3), (0, 9)),
        ("fr", "Cafe\u0301\u00a0!", "café", (0, 1), (0, 4)),
        ("es", "¿Qué tal?", "que tal", (1, 2), (1, 7)),
        ("ar", "كيف الحال؟", "كيف الحال", (0, 2), (0, 9)),
        ("fa", "می\u200cخواهم", "میخواهم", (0, 1), (0, 7)),
        ("de", "Soft\u00adware ☀\ufe0f", "software", (0, 1), (0, 8)),
        ("ko", "안녕 하세요", "안녕하세요", (2, 2), (1, 6)),
    ],
)
def test_each_language_by_what_it_is_written_in(
    language: str, reference: str, hypothesis: str, words: tuple[int, int], chars: tuple[int, int]
) -> None:
    errors = count_errors(reference, hypothesis, language)
    assert (errors.word_errors, errors.words) == words
    assert (errors.char_errors, errors.chars) == chars


def test_vowels_of_hindi_and_thai_are_kept() -> None:
    """OpenAI's basic normaliser makes `ह न द म` of this."""
    assert normalize("हिन्दी में", "hi") == "हिन्दी में"
    assert normalize("ไม่เป็นไร", "th") == "ไม่เป็นไร"
    assert normalize("E\u0323\u0301gbo\u0323\u0301n", "yo") == "\u1eb9\u0301gb\u1ecd\u0301n"
    assert normalize("l\u00b4été", "fr") == "l été"  # an accent on nothing is no letter


@pytest.mark.parametrize("text", ["你好世界", "привет мир", "les élèves ça"])
def test_plain_text_is_what_the_basic_normaliser_makes_of_it(text: str) -> None:
    assert normalize(text, "basic") == str(BasicTextNormalizer()(text)) == text


@pytest.mark.parametrize("language", ["en", "EN", "en-US", "en_GB.UTF-8", "eng", "English"])
def test_english_by_any_code(language: str) -> None:
    assert normalize("I'm twenty", language) == "i am 20"
    assert not by_characters(language)


def test_languages_without_spaces() -> None:
    assert all(map(by_characters, ("zh", "zh-TW", "cmn", "yue", "ja", "th", "lo", "my", "km")))
    assert not any(map(by_characters, ("ko", "vi", "hi", "ru", "fr", "", "basic")))


def test_nothing_said_in_chinese() -> None:
    assert count_errors("……", "你好", "zh") == Errors(2, 0, 2, 0, insertions=2)
    assert count_errors("你好", "", "zh") == Errors(2, 2, 2, 2, deletions=2)


# -- languages apart ---------------------------------------------------------------------------


def _row(language: str, reference: str, hypothesis: str) -> dict[str, Any]:
    errors = count_errors(reference, hypothesis, language)
    return {"language": language, "reference": reference, "errors": errors}


def test_languages_are_reported_apart_where_there_are_several() -> None:
    rows = [
        _row("fr", "un deux trois quatre", "un deux trois"),
        _row("zh-CN", "你好世界", "你好世间"),
        _row("zh", "你好", "你好"),
    ]
    found = by_language(rows)
    assert found == {
        "fr": {"wer": 0.25, "cer": 7 / 20, "utterances": 1, "by": "wer"},
        "zh": {"wer": 1 / 6, "cer": 1 / 6, "utterances": 2, "by": "cer"},
    }
    assert by_language(rows[1:]) == by_language([]) == {}


def test_short_is_two_words_or_four_characters() -> None:
    rows = [_row("en", "hello there", ""), _row("zh", "你好世界", ""), _row("zh", "你好新世界", "")]
    found = summarize(rows)
    assert (found["short"].words, found["long"].words) == (2 + 4, 5)


def test_edits_are_told_apart() -> None:
    errors = count_errors("press two now please", "press to now right please please")
    assert (errors.substitutions, errors.insertions, errors.deletions) == (1, 2, 0)
    assert count_errors("press two", "two").deletions == 1
    assert (errors + errors).insertions == 4 and (errors + errors).word_errors == 6
