"""Tokenizers: omni's own and nanochat's BPE, or the tokenizer of a transformers model."""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from omni.model.special_marks import MarkedIds, MarkEncoder, check_text
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
_NOW = "strftime_now"  # what chat templates call to print the date
# nanochat's pattern: that of GPT-4, with numbers in groups of at most two digits.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rendering:
    """Variables of a chat template besides its messages, saved with the tokenizer of a run."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that templates call them by: bos_token, eos_token, …"""
    moment: str | None = None
    """Date and time, ISO 8601, that the template prints as today's; None: the present."""


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
        rendering: Rendering | None = Rendering(),
    ) -> None:
        """Wrap `tokenizer`.

        end_token: given for a transformers model, with bos_token and chat_template. None: the
        vocabulary ends with nanochat's special tokens. Raises ValueError naming a missing token.
        rendering: None in runs of older versions, which encoded the texts between the contents of
        messages apart and took the first token after an answer for its end.
        """
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.chat_template = chat_template
        self.rendering = rendering
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
        own: dict[str, Any] = {**self._named_tokens, "chat_template": self.chat_template}
        if self.rendering is not None:
            own["rendering"] = asdict(self.rendering)
        return json.dumps({"tokenizer": json.loads(text), **own}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SpeechTokenizer:
        found = json.loads(text)
        if not isinstance(found, dict) or "tokenizer" not in found:
            return cls(Tokenizer.from_str(text))
        inner = Tokenizer.from_str(json.dumps(found.pop("tokenizer")))
        rendering = found.pop("rendering", None)
        return cls(inner, **found, rendering=None if rendering is None else Rendering(**rendering))

    def at(self, moment: datetime) -> SpeechTokenizer:
        """Return this tokenizer with a chat template that prints a fixed date.

        The way of rendering is the present one, whatever that of a tokenizer from an older run.
        """
        if self._named_tokens is None:
            return self
        asks = self.chat_template is not None and _NOW in self.chat_template
        rendering = replace(
            self.rendering or Rendering(), moment=moment.isoformat() if asks else None
        )
        names = self._named_tokens
        return SpeechTokenizer(
            self._tokenizer, **names, chat_template=self.chat_template, rendering=rendering
        )

    def encode(self, text: str) -> list[int]:
        """Encode plain text; a special token spelled out in it is encoded as text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode plain texts, as `encode`."""
        if self.rendering is not None and self._spells_special_tokens:
            return [found.ids for found in self.encode_marked([check_text(t) for t in texts])]
        return self._encode_batch(texts)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = True
        # The fast variant leaves out character offsets.
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    @functools.cached_property
    def _spells_special_tokens(self) -> bool:
        """Tell whether text can be encoded as a special token, as in a Unigram vocabulary."""
        if self._named_tokens is None:
            return False
        special = {t.content: i for i, t in self._added_tokens().items() if t.special}
        encoded = self._encode_batch(list(special))
        return any(i in ids for i, ids in zip(special.values(), encoded, strict=True))

    def _added_tokens(self) -> dict[int, Any]:
        found: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        return found

    def encode_markup(self, text: str) -> list[int]:
        """Encode text of a template, in which special tokens count as such."""
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def marks(self) -> MarkEncoder:
        """Encoder of texts with marks in the place of special tokens."""
        names = [name for name in (self._named_tokens or {}).values() if name is not None]
        return MarkEncoder(self._tokenizer, names)

    def encode_marked(self, texts: Sequence[str]) -> list[MarkedIds]:
        """Encode texts with marks, AUDIO for a recording."""
        return self.marks.encode(texts)

    def token_id(self, token: str) -> int:
        """Return the id of a token. Raises ValueError for one that there is not."""
        return self._id(token)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Render messages ("role", "content") with the chat template.

        Raises ValueError where the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            text: str = self._renderer.apply_chat_template(
                messages, tokenize=False, enable_thinking=False, **self._template_tokens
            )
        # Templates are programs: one that expects other messages fails in any way.
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        return text

    @functools.cached_property
    def _renderer(self) -> Any:
        """A tokenizer of transformers for its chat template alone; it needs no vocabulary."""
        if self.rendering is None:
            return self.to_transformers()
        from transformers import PreTrainedTokenizerFast

        dated = self.chat_template or ""
        if self.rendering.moment is not None:
            dated = _fixed_date(datetime.fromisoformat(self.rendering.moment)) + dated
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), chat_template=dated
        )

    @property
    def _template_tokens(self) -> Mapping[str, Any]:
        if self.rendering is None:
            return {}
        if self.rendering.special_tokens:
            return self.rendering.special_tokens
        named = self._named_tokens or {}
        own = {"bos_token": named.get("bos_token"), "eos_token": named.get("end_token")}
        return {name: token for name, token in own.items() if token is not None}

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


def _fixed_date(moment: datetime) -> str:
    """Return the beginning of a chat template in which `strftime_now` formats a fixed moment.

    A macro of the template is found before the function that transformers offers to it.
    """
    codes = [f"%{flag}{code}" for code in string.ascii_letters for flag in ("", "-")]
    values = [("%%", "\0"), *((code, moment.strftime(code)) for code in codes), ("\0", "%")]
    steps = "".join(f"|replace({json.dumps(a)}, {json.dumps(b)})" for a, b in values)
    # After the empty expression, Jinja keeps a line break with which the template begins.
    return f"{{% macro {_NOW}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}{{{{ '' }}}}"
