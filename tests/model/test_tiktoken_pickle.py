"""tokenizer.pkl: the same ids as tiktoken's own, and nothing of a crafted pickle is ever run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import tiktoken

from omni.config import load_config
from omni.errors import ConfigError
from omni.model.tokenizer import SPECIAL_TOKENS, SPLIT, SpeechTokenizer
from omni.run.prepare import prepare

TEXTS = [
    "Please enter your mailbox number, followed by the pound key.",
    "The  person at extension 1234567890 isn't available!\n\tPlease leave a message.",
    "naïve café – 你好，世界 Привет 🎉 <|bos|> e\u0301",
    "",
    " ",
]


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    """A byte-pair encoding of nanochat's kind, learnt by joining frequent neighbours."""
    words = [
        list(bytes([b]) for b in word.encode())
        for word in " ".join(TEXTS * 3).replace("<|bos|>", "").split(" ")
    ]
    ranks = {bytes([value]): value for value in range(256)}
    while len(ranks) < 400:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [best[0] + best[1]]
                at += 1
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials
    )


@pytest.fixture
def pickled(encoding: tiktoken.Encoding, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_tiktokens(encoding: tiktoken.Encoding, pickled: Path, text: str) -> None:
    tokenizer = SpeechTokenizer.load(pickled)
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    assert tokenizer.decode(encoding.encode_ordinary(text)) == text
    assert tokenizer.vocab_size == encoding.n_vocab
    assert tokenizer.bos == encoding.encode_single_token("<|bos|>")


class _Runs:
    """A pickle that leaves a file behind when it is loaded in the usual way."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._trace}",)


def test_a_crafted_pickle_is_refused_and_not_run(
    tmp_path: Path, encoding: tiktoken.Encoding
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "tokenizer.pkl"
    for value in (_Runs(trace), [encoding, _Runs(trace)], {"encoding": _Runs(trace)}):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=r"tokenizer\.pkl: .*\.system\b"):
            SpeechTokenizer.load(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the pickle was harmless: this test showed nothing"


@pytest.mark.parametrize("name", ["builtins eval", "tiktoken.core Encoding.__init__", "os system"])
def test_no_other_name_is_looked_up(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.partition(" ")
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(f"c{module}\n{attribute}\n(S'1'\ntR.".encode())
    with pytest.raises(ValueError, match=rf"tokenizer\.pkl: .*\b{module}\.{attribute}\b"):
        SpeechTokenizer.load(path)


def test_what_is_no_encoding_is_one_clear_error(
    tmp_path: Path, encoding: tiktoken.Encoding
) -> None:
    path = tmp_path / "tokenizer.pkl"
    whole = pickle.dumps(encoding)
    for data in (
        b"",
        b"not a pickle",
        whole[: len(whole) // 2],
        pickle.dumps({"a": 1}),
        whole[:-1],
    ):
        path.write_bytes(data)
        with pytest.raises(
            ConfigError, match=r"^tokenizer\.path: .*tokenizer\.pkl: .*\btiktoken\b"
        ):
            prepare(load_config(None, ["--tokenizer.path", str(path)]))


def test_ranks_with_a_hole_are_refused(tmp_path: Path) -> None:
    ranks = {bytes([value]): value for value in range(256)} | {b"abc": 256}
    broken = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(broken))
    with pytest.raises(ValueError, match=r"tokenizer\.pkl: .*'abc'"):
        SpeechTokenizer.load(path)


def test_a_pattern_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    ranks = {bytes([value]): value for value in range(256)}
    whole = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    path = tmp_path / "tokenizer.pkl"
    data = pickle.dumps(whole)
    assert b"(?i:" in data
    path.write_bytes(data.replace(b"(?i:", b"(?q:"))
    with pytest.raises(ValueError, match=r"tokenizer\.pkl: .*\bpattern\b"):
        SpeechTokenizer.load(path)
