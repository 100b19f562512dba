"""nanochat's tokenizer.pkl without trusting it: a pickle can run any code of its author's choice.

The file is a pickled tiktoken.Encoding, whose state is plain data (name, pattern, ranks, specials).
The unpickler admits that one constructor, and puts a class that can do nothing in its place.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    import tiktoken


class _Encoding:
    """What the pickle takes for tiktoken.Encoding."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _OnlyEncoding(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted")
        return _Encoding


def load_tiktoken_pickle(path: Path) -> Tokenizer:
    """The pickled encoding as a `tokenizers` BPE with the same ids.

    Raises ValueError: not such a pickle, anything but a tiktoken Encoding in it, or special tokens
    that do not follow the others.
    """
    try:
        with path.open("rb") as file:
            found = _OnlyEncoding(file).load()
    except OSError:
        raise
    except Exception as error:  # a pickle can fail in as many ways as it has instructions
        raise ValueError(f"{path}: expected a pickled tiktoken Encoding: {error}") from None
    state = getattr(found, "state", None)
    if not isinstance(found, _Encoding) or state is None or not _is_state(state):
        raise ValueError(f"{path}: expected a pickled tiktoken Encoding with its ranks")
    try:
        return _convert(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """A byte-level BPE as nanochat pickles it. Raises ValueError for any other tokenizer."""
    import tiktoken

    document = json.loads(tokenizer.to_str())
    specials = {token["content"]: token["id"] for token in document["added_tokens"]}
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    try:
        split, _ = document["pre_tokenizer"]["pretokenizers"]
        pattern = split["pattern"]["Regex"]
        ranks = {
            bytes(byte_of[letter] for letter in token): rank
            for token, rank in document["model"]["vocab"].items()
            if token not in specials
        }
    except (KeyError, TypeError, ValueError):
        raise ValueError("expected a byte-level BPE with nanochat's kind of text split") from None
    return tiktoken.Encoding(
        "rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
    )


def _is_state(state: Any) -> bool:
    if not isinstance(state, dict):
        return False
    ranks, specials = state.get("mergeable_ranks"), state.get("special_tokens")
    return (
        isinstance(state.get("pat_str"), str)
        and isinstance(ranks, dict)
        and all(type(token) is bytes and type(rank) is int for token, rank in ranks.items())
        and sorted(ranks.values()) == list(range(len(ranks)))
        and all(bytes([value]) in ranks for value in range(256))
        and isinstance(specials, dict)
        and all(type(token) is str and type(number) is int for token, number in specials.items())
    )


def _convert(state: dict[str, Any]) -> Tokenizer:
    ranks: dict[bytes, int] = state["mergeable_ranks"]
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (written(left), written(right))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for left, right in [_last_merge(ranks, token, rank)]
    ]
    try:
        split = Regex(state["pat_str"])
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"its pattern for splitting text: {error}") from None
    vocab = {written(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = sorted(state["special_tokens"].items(), key=lambda item: item[1])
    if known := [name for name, _ in specials if name in vocab]:
        raise ValueError(f"{known} are both ordinary and special tokens")
    if [number for _, number in specials] != list(range(len(ranks), len(ranks) + len(specials))):
        raise ValueError("expected the special tokens right after the others")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name, _ in specials])
    return tokenizer


def _last_merge(ranks: dict[bytes, int], token: bytes, limit: int) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last to make `token`, from ranks below its own.

    Raises ValueError where they do not exist: then the ranks are no byte-pair encoding.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        at = min(range(len(joined)), key=joined.__getitem__)
        if joined[at] >= limit:
            raise ValueError(f"the token {token!r} is not made of earlier ones")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
