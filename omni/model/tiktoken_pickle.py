"""Read nanochat's tokenizer.pkl safely: unpickling an untrusted file can run any code.

The file is a pickled tiktoken.Encoding, whose state is plain data (name, pattern, ranks, specials).
The unpickler accepts that class only, and replaces it by one without behaviour.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    import tiktoken


def _letters() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte."""
    # transformers takes a second to import, in every process of a run.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


class _Encoding:
    """Stand-in for tiktoken.Encoding that keeps the pickled state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _OnlyEncoding(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which is not allowed")
        return _Encoding


def load_tiktoken_pickle(path: Path) -> Tokenizer:
    """Load a pickled encoding as a BPE of `tokenizers` with the same ids.

    Raises ValueError naming the file: it is not such a pickle, or its special tokens do not come
    after the others.
    """
    try:
        with path.open("rb") as file:
            found = _OnlyEncoding(file).load()
    except OSError:
        raise
    except Exception as error:  # A damaged pickle can raise any class of error.
        raise ValueError(f"{path}: expected a pickled tiktoken Encoding: {error}") from None
    state = getattr(found, "state", None)
    if not isinstance(found, _Encoding) or state is None or not _is_state(state):
        raise ValueError(f"{path}: expected a pickled tiktoken Encoding with its ranks")
    try:
        return _convert(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """Convert a byte-level BPE to nanochat's class. Raises ValueError for other tokenizers."""
    import tiktoken

    document = json.loads(tokenizer.to_str())
    specials = {token["content"]: token["id"] for token in document["added_tokens"]}
    byte_of = {letter: byte for byte, letter in _letters().items()}
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
    letters = _letters()

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
    except Exception as error:  # The library raises plain Exception.
        raise ValueError(f"pat_str: expected a pattern for splitting text: {error}") from None
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
        raise ValueError(f"special_tokens: {known} are ordinary tokens too")
    if [number for _, number in specials] != list(range(len(ranks), len(ranks) + len(specials))):
        raise ValueError("special_tokens: expected ids that follow those of the ordinary tokens")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name, _ in specials])
    return tokenizer


def _last_merge(ranks: dict[bytes, int], token: bytes, limit: int) -> tuple[bytes, bytes]:
    """Find the two parts that byte-pair encoding merges last into `token`, of ranks below its own.

    Raises ValueError where there are none: the ranks are not a byte-pair encoding.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        at = min(range(len(joined)), key=joined.__getitem__)
        if joined[at] >= limit:
            raise ValueError(f"mergeable_ranks: {token!r} is not a merge of tokens of lower rank")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
