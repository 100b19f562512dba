"""The tokenizer loses nothing, trains the same way twice, and keeps special tokens out of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.model.download import ASSETS
from omni.model.tokenizer import SPECIAL_TOKENS, SpeechTokenizer

NANOCHAT_ORDER = [
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
]
TEXTS = [
    "Hello there.",
    "  two  spaces\n\nand ümlauts, 中文 и кириллица!",
    "Call 0123456789 at 12:30, extension 7; it's 3.14.",
    "naïve café e\u0301 👩‍🚀 \u0000\t\r\n",
    "",
]


@pytest.fixture(scope="module")
def transcripts() -> list[str]:
    lines = (ASSETS / "prompts-en" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer(transcripts: list[str]) -> SpeechTokenizer:
    return SpeechTokenizer.train(transcripts, 512)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_as_it_went(tokenizer: SpeechTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_encoded_like_its_texts(tokenizer: SpeechTokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_tokens_end_the_vocabulary_in_the_order_of_nanochat(
    tokenizer: SpeechTokenizer,
) -> None:
    assert list(SPECIAL_TOKENS) == NANOCHAT_ORDER
    assert tokenizer.vocab_size == 512
    assert [tokenizer.special_ids[name] for name in NANOCHAT_ORDER] == list(range(503, 512))
    assert (tokenizer.bos, tokenizer.end) == (503, 507)


@pytest.mark.parametrize("name", NANOCHAT_ORDER)
def test_a_special_token_spelled_out_stays_text(tokenizer: SpeechTokenizer, name: str) -> None:
    text = f"say {name} now"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text
    # Also in a tokenizer that was loaded and not trained.
    assert SpeechTokenizer.from_json(tokenizer.to_json()).encode(text) == ids


def test_special_tokens_are_left_out_of_decoded_text(tokenizer: SpeechTokenizer) -> None:
    ids = [tokenizer.bos, *tokenizer.encode("Hello there."), tokenizer.end]
    assert tokenizer.decode(ids) == "Hello there."


def test_training_is_deterministic(transcripts: list[str], tokenizer: SpeechTokenizer) -> None:
    assert SpeechTokenizer.train(transcripts, 512).to_json() == tokenizer.to_json()


def test_training_learns_from_its_texts(transcripts: list[str], tokenizer: SpeechTokenizer) -> None:
    text = "The conference is now recording."
    assert len(tokenizer.encode(text)) < len(text) / 2
    bytes_only = SpeechTokenizer.train(transcripts, 256 + len(SPECIAL_TOKENS))
    assert len(bytes_only.encode(text)) == len(text)


def test_a_small_corpus_yields_fewer_tokens() -> None:
    small = SpeechTokenizer.train(["ab ab ab"], 1000)
    assert 256 + len(SPECIAL_TOKENS) < small.vocab_size < 300
    assert sorted(small.special_ids.values()) == list(range(small.vocab_size))[-9:]


def test_a_vocabulary_without_room_for_bytes_and_specials_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\bvocab_size 264\b.*\b265\b"):
        SpeechTokenizer.train(["text"], 264)


def test_numbers_are_split_in_groups_of_at_most_two_digits() -> None:
    # Trained on nothing but long numbers: the split must hold, whatever is frequent.
    numbers = SpeechTokenizer.train(["2024 1999 123456"] * 50, 400)
    pieces = [numbers.decode([number]) for number in numbers.encode("20241999123")]
    assert pieces == ["20", "24", "19", "99", "12", "3"]


def test_words_keep_their_leading_space_and_contractions_are_apart() -> None:
    words = SpeechTokenizer.train(["it's the one, it's the one"] * 50, 400)
    pieces = [words.decode([number]) for number in words.encode("it's the one")]
    assert pieces == ["it", "'s", " the", " one"]


def test_a_saved_tokenizer_is_the_same_one(tokenizer: SpeechTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = SpeechTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_a_tokenizer_without_special_tokens_is_refused(tokenizer: SpeechTokenizer) -> None:
    values = json.loads(tokenizer.to_json().replace("<|bos|>", "<|start|>"))
    with pytest.raises(ValueError, match=r"<\|bos\|>"):
        SpeechTokenizer.from_json(json.dumps(values))
