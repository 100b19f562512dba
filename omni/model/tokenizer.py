"""Text to ids and back: omni's own and nanochat's BPE, or the tokenizer of a transformers model."""

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
# GPT-4's split with numbers in groups of at most two digits, as nanochat's.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


class SpeechTokenizer:
    """A `tokenizers` tokenizer, and what its language model takes for beginning and end.

    Without a chat template it is nanochat's kind: its special tokens at the end of the vocabulary.

    bos: the id that begins a text, None where the model knows none. end: the id that ends it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_token: str | None = None,
        end_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """end_token: given for a model of transformers, with its other marks."""
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.chat_template = chat_template
        self.special_ids: dict[str, int] = {}
        self._marks: dict[str, str | None] | None = None
        if end_token is not None:
            self._marks = {"bos_token": bos_token, "end_token": end_token}
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
            raise ValueError(f"vocab_size {vocab_size} is under {smallest} (bytes and specials)")
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
        """A tokenizer.json, one that `save` wrote, or nanochat's tokenizer.pkl."""
        if Path(path).suffix == ".pkl":
            return cls(load_tiktoken_pickle(Path(path)))
        return cls.from_json(Path(path).read_text())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    def to_json(self) -> str:
        """The tokenizer of the `tokenizers` library, inside an object with the marks if it has
        some."""
        text: str = self._tokenizer.to_str()
        if self._marks is None:
            return text
        own = {**self._marks, "chat_template": self.chat_template}
        return json.dumps({"tokenizer": json.loads(text), **own}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SpeechTokenizer:
        found = json.loads(text)
        if not isinstance(found, dict) or "tokenizer" not in found:
            return cls(Tokenizer.from_str(text))
        inner = Tokenizer.from_str(json.dumps(found.pop("tokenizer")))
        return cls(inner, **found)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a special token spelled out in the text stays text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = True
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]  # fast: without the places in the text

    def encode_markup(self, text: str) -> list[int]:
        """Ids of a template's text, in which special tokens are what they say."""
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Messages ("role", "content") as the chat template writes them."""
        text: str = self.to_transformers().apply_chat_template(
            messages, tokenize=False, enable_thinking=False
        )
        return text

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same as nanochat keeps it. Raises ValueError for a transformers model's tokenizer."""
        if self._marks is not None:
            raise ValueError("the tokenizer of a transformers model is not nanochat's kind")
        return to_tiktoken(self._tokenizer)

    def to_transformers(self) -> Any:
        """The same as a tokenizer of transformers."""
        from transformers import PreTrainedTokenizerFast

        marks = self._marks or {"bos_token": "<|bos|>", "end_token": "<|assistant_end|>"}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self._tokenizer.to_str()),
            bos_token=marks["bos_token"],
            eos_token=marks["end_token"],
            pad_token=marks["end_token"],
            chat_template=self.chat_template,
        )
