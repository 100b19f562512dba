"""Render messages to token ids and mark which are audio, given text and supervised text.

A template defines the tokens between the contents of messages. `plain` is the sequence

    | audio | <|bos|> | prompt | text | end |

and `chat` is that of the tokenizer: nanochat's, or the Jinja template of a transformers tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from omni.model.tokenizer import SpeechTokenizer

AUDIO = -1  # id of a recording, which its soft tokens replace
PLACEHOLDER = "<|audio|>"  # position of the recording in a prompt
Kind = Literal["plain", "chat"]
Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")
_SENTINEL = 0xF0000  # first of the private-use characters that mark contents in a rendered template


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[str | int, ...]
    """Texts, and AUDIO for each recording."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids."""

    ids: list[int]
    """Token ids, and AUDIO for each recording."""
    supervised: list[bool]
    """True for ids that count in the loss."""


def transcription(prompt: str, text: str) -> tuple[Message, Message]:
    """Make the messages of one recording, its prompt and the expected text.

    The recording comes before the prompt, or at <|audio|> in it.
    """
    before, found, after = prompt.partition(PLACEHOLDER)
    parts: tuple[str | int, ...] = (before, AUDIO, after) if found else (AUDIO, prompt)
    user = Message("user", tuple(part for part in parts if part != ""))
    return user, Message("assistant", (text,))


# Role of each message and, for each of its parts, True if it is audio.
Shape = tuple[tuple[str, tuple[bool, ...]], ...]


class Template:
    """Renders messages with one tokenizer and one kind of template.

    end: id that ends an answer. Raises ValueError where the chat template leaves out or reorders
    messages, or does not end an answer.
    """

    def __init__(self, tokenizer: SpeechTokenizer, kind: Kind = "plain") -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self._glue: dict[Shape, list[list[int]]] = {}
        turn = self._between(_shape(transcription("", "x")))
        if not turn[-1]:
            raise ValueError(
                "the chat template has no token after an answer: its end cannot be learnt"
            )
        self.end = turn[-1][0]

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Render whole conversations; the end token of the last answer is the last id."""
        merged = [self._merged(messages) for messages in conversations]
        texts = [part for m in merged for message in m for part in message.parts if part != AUDIO]
        # Most prompts repeat, so each distinct text is encoded once.
        distinct = list(dict.fromkeys(map(str, texts)))
        encoded = dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))
        ids = (encoded[str(text)] for text in texts)
        return [self._assemble(messages, ids) for messages in merged]

    def _assemble(self, messages: list[Message], contents: Iterator[list[int]]) -> Rendered:
        glue = self._between(_shape(messages))
        rendered = Rendered([], [])

        def add(ids: Sequence[int], supervised: bool) -> None:
            rendered.ids.extend(ids)
            rendered.supervised.extend([supervised] * len(ids))

        pieces = [(m.role, part) for m in messages for part in m.parts]
        add(glue[0], False)
        for number, (role, part) in enumerate(pieces):
            answer = role == "assistant"
            add([AUDIO] if part == AUDIO else next(contents), answer)
            after = glue[number + 1]
            add(after[:1], answer)
            if number + 1 < len(pieces):
                add(after[1:], False)
        return rendered

    def _merged(self, messages: Sequence[Message]) -> list[Message]:
        """Prepend a system message to the first user message: nanochat has no system role."""
        if self.kind == "plain" or self.tokenizer.chat_template is not None:
            return list(messages)
        first, *rest = messages
        if first.role != "system":
            return list(messages)
        lead = (*first.parts, "\n\n")
        user, *others = rest
        parts = lead + user.parts
        joined: list[str | int] = []
        for part in parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        return [Message("user", tuple(joined)), *others]

    def _between(self, shape: Shape) -> list[list[int]]:
        """Return the ids before, between and after the parts of messages of a shape."""
        if shape not in self._glue:
            if self.kind == "plain":
                self._glue[shape] = self._plain(shape)
            elif self.tokenizer.chat_template is None:
                self._glue[shape] = self._nanochat(shape)
            else:
                self._glue[shape] = self._jinja(shape)
        return self._glue[shape]

    def _plain(self, shape: Shape) -> list[list[int]]:
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        glue: list[list[int]] = [[]]
        has_bos = False  # The turn has its bos already.
        for role, parts in shape:
            for is_audio in parts:
                if not is_audio and not has_bos:
                    glue[-1] += bos
                    has_bos = True
                glue.append([])
            if role == "assistant":
                glue[-1].append(self.tokenizer.end)
                has_bos = False
        return glue

    def _nanochat(self, shape: Shape) -> list[list[int]]:
        special = self.tokenizer.special_ids
        glue = [[special["<|bos|>"]]]
        for role, parts in shape:
            glue[-1].append(special[f"<|{role}_start|>"])
            glue += [[] for _ in parts]
            glue[-1].append(special[f"<|{role}_end|>"])
        return glue

    def _jinja(self, shape: Shape) -> list[list[int]]:
        messages: list[dict[str, str]] = []
        sentinels: list[str] = []
        for role, parts in shape:
            fresh = [chr(_SENTINEL + len(sentinels) + i) for i in range(len(parts))]
            sentinels += fresh
            messages.append({"role": role, "content": "".join(fresh)})
        text = self.tokenizer.render_chat(messages)
        pieces = []
        for sentinel in sentinels:
            before, found, text = text.partition(sentinel)
            if not found:
                raise ValueError("the chat template leaves out a message, or changes their order")
            pieces.append(before)
        return [self.tokenizer.encode_markup(piece) for piece in (*pieces, text)]


def make_template(tokenizer: SpeechTokenizer, kind: Literal["auto", "plain", "chat"]) -> Template:
    """Make a template; auto chooses chat where the tokenizer has a chat template, else plain.

    Raises ValueError as `Template`.
    """
    if kind == "auto":
        kind = "plain" if tokenizer.chat_template is None else "chat"
    return Template(tokenizer, kind)


def _shape(messages: Sequence[Message]) -> Shape:
    return tuple((m.role, tuple(part == AUDIO for part in m.parts)) for m in messages)


def check_messages(messages: Sequence[Message]) -> None:
    """Check roles and parts of a conversation. Raises ValueError naming the message."""
    if not messages or messages[-1].role != "assistant":
        raise ValueError("the last message: expected role assistant")
    for number, message in enumerate(messages):
        if message.role not in _ROLES:
            raise ValueError(f"message {number}: role {message.role!r}, expected {_ROLES}")
        if message.role == "system" and number:
            raise ValueError(f"message {number}: role system is only allowed in the first message")
        if not message.parts:
            raise ValueError(f"message {number}: empty; expected text or audio")
        if message.role != "user" and AUDIO in message.parts:
            raise ValueError(f"message {number}: audio is only allowed in role user")
