"""Tokenizers: omni's own and nanochat's BPE, or the tokenizer of a transformers model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from omni.model.tiktoken_pickle import load_tiktoken_pickle, to_tiktoken

if TYPE_CHECKING:
    import tiktoken

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# nanochat's pattern: that of GPT-4, with numbers in groups of at most two digits.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


class SpeechTokenizer:
    """A tokenizer of the `tokenizers` library with the begin and end tokens of its language model.

    bos: id that begins a text; None where the model has none. end: id that ends an answer.
    special_ids: ids of nanochat's special tokens; empty for a transformers model.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_token: str | None = None,
        end_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap `tokenizer`.

        end_token: given for a transformers model, with bos_token and chat_template. None: the
        vocabulary ends with nanochat's special tokens. Raises ValueError naming a missing token.
        """
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.chat_template = chat_template
        self.special_ids: dict[str, int] = {}
        self._named_tokens: dict[str, str | None] | None = None
        if end_token is not None:
            self._named_tokens = {"bos_token": bos_token, "end_token": end_token}
            self.bos = None if bos_token is None else self._id(bos_token)
            self.end = self._id(end_token)
            return
        self.special_ids = {name: self._id(name) for name in SPECIAL_TOKENS}
        self.bos = self.special_ids["<|bos|>"]
        self.end = self.special_ids["<|assistant_end|>"]

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"tokenizer lacks the special token {token}")
        return int(number)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> SpeechTokenizer:
        """Train BPE on `texts`. Small corpora may yield fewer than `vocab_size` tokens.

        vocab_size counts the 256 bytes and the special tokens.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size {vocab_size}: expected {smallest} or more (256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens)"
            )
        tokenizer = Tokenizer(models.BPE(byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> SpeechTokenizer:
        """Load a tokenizer.json, a file that `save` wrote, or nanochat's tokenizer.pkl."""
        if Path(path).suffix == ".pkl":
            return cls(load_tiktoken_pickle(Path(path)))
        return cls.from_json(Path(path).read_text())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    def to_json(self) -> str:
        """Serialise to the JSON of `tokenizers`, wrapped together with the names of begin and end
        tokens and the chat template where it has them."""
        text: str = self._tokenizer.to_str()
        if self._named_tokens is None:
            return text
        own = {**self._named_tokens, "chat_template": self.chat_template}
        return json.dumps({"tokenizer": json.loads(text), **own}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SpeechTokenizer:
        found = json.loads(text)
        if not isinstance(found, dict) or "tokenizer" not in found:
            return cls(Tokenizer.from_str(text))
        inner = Tokenizer.from_str(json.dumps(found.pop("tokenizer")))
        return cls(inner, **found)

    def encode(self, text: str) -> list[int]:
        """Encode plain text; a special token spelled out in it is encoded as text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = True
        # The fast variant leaves out character offsets.
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_markup(self, text: str) -> list[int]:
        """Encode text of a template, in which special tokens count as such."""
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Render messages ("role", "content") with the chat template."""
        text: str = self.to_transformers().apply_chat_template(
            messages, tokenize=False, enable_thinking=False
        )
        return text

    def to_tiktoken(self) -> tiktoken.Encoding:
        """Convert to nanochat's class. Raises ValueError for a transformers model's tokenizer."""
        if self._named_tokens is not None:
            raise ValueError("expected nanochat's kind of tokenizer, got a transformers model's")
        return to_tiktoken(self._tokenizer)

    def to_transformers(self) -> Any:
        """Convert to a fast tokenizer of transformers."""
        from transformers import PreTrainedTokenizerFast

        named = self._named_tokens or {"bos_token": "<|bos|>", "end_token": "<|assistant_end|>"}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self._tokenizer.to_str()),
            bos_token=named["bos_token"],
            eos_token=named["end_token"],
            pad_token=named["end_token"],
            chat_template=self.chat_template,
        )
