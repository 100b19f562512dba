"""From messages to token ids: which positions are audio, text that is given, text to be learnt.

A template says what stands between the contents of messages. `plain` is the bare sequence

    | audio | <|bos|> | prompt | text | end |

and `chat` is the tokenizer's own: nanochat's, or the Jinja template of a transformers tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from omni.model.tokenizer import SpeechTokenizer

AUDIO = -1  # the id that stands for a recording; its soft tokens take the place
PLACEHOLDER = "<|audio|>"  # the same in a prompt
Kind = Literal["plain", "chat"]
Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")
_SENTINEL = 0xF0000  # private characters that stand for contents in a rendered template


@dataclass(frozen=True)
class Message:
    """parts: texts, and AUDIO where a recording stands."""

    role: Role
    parts: tuple[str | int, ...]


@dataclass(frozen=True)
class Rendered:
    """ids with AUDIO for each recording; supervised: which of them are to be learnt."""

    ids: list[int]
    supervised: list[bool]


def transcription(prompt: str, text: str) -> tuple[Message, Message]:
    """One recording and what is to be written about it.

    The recording comes before the prompt, or where the prompt has its <|audio|>.
    """
    before, found, after = prompt.partition(PLACEHOLDER)
    parts: tuple[str | int, ...] = (before, AUDIO, after) if found else (AUDIO, prompt)
    user = Message("user", tuple(part for part in parts if part != ""))
    return user, Message("assistant", (text,))


Shape = tuple[tuple[str, tuple[bool, ...]], ...]  # role, and for each part whether it is audio


class Template:
    """Messages to ids, by one tokenizer and one kind of template.

    Raises ValueError: the tokenizer has no chat template, or it does not show what it is given.
    """

    def __init__(self, tokenizer: SpeechTokenizer, kind: Kind = "plain") -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self._glue: dict[Shape, list[list[int]]] = {}
        turn = self._between(_shape(transcription("", "x")))
        if not turn[-1]:
            raise ValueError("the template puts nothing after an answer, so that none would end")
        self.end = turn[-1][0]

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Ids of whole conversations; the end token of the last answer is the last of them."""
        merged = [self._merged(messages) for messages in conversations]
        texts = [part for m in merged for message in m for part in message.parts if part != AUDIO]
        different = list(dict.fromkeys(map(str, texts)))  # prompts are few
        known = dict(zip(different, self.tokenizer.encode_batch(different), strict=True))
        ids = (known[str(text)] for text in texts)
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
        """nanochat's chats have no system role: such a text leads the first user message."""
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
        """Ids before, between and after the parts of messages of this shape."""
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
        opened = False  # whether this turn has its bos
        for role, parts in shape:
            for is_audio in parts:
                if not is_audio and not opened:
                    glue[-1] += bos
                    opened = True
                glue.append([])
            if role == "assistant":
                glue[-1].append(self.tokenizer.end)
                opened = False
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
        marks: list[str] = []
        for role, parts in shape:
            fresh = [chr(_SENTINEL + len(marks) + i) for i in range(len(parts))]
            marks += fresh
            messages.append({"role": role, "content": "".join(fresh)})
        text = self.tokenizer.render_chat(messages)
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise ValueError("the chat template leaves out a message, or changes their order")
            pieces.append(before)
        return [self.tokenizer.encode_markup(piece) for piece in (*pieces, text)]


def make_template(tokenizer: SpeechTokenizer, kind: Literal["auto", "plain", "chat"]) -> Template:
    """auto: the chat template of a chat model, else plain. Raises ValueError."""
    if kind == "auto":
        kind = "plain" if tokenizer.chat_template is None else "chat"
    return Template(tokenizer, kind)


def _shape(messages: Sequence[Message]) -> Shape:
    return tuple((m.role, tuple(part == AUDIO for part in m.parts)) for m in messages)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError saying what is wrong with a conversation."""
    if not messages or messages[-1].role != "assistant":
        raise ValueError("expected the last message to be the assistant's")
    for number, message in enumerate(messages):
        if message.role not in _ROLES:
            raise ValueError(f"message {number}: role {message.role!r}, expected {_ROLES}")
        if message.role == "system" and number:
            raise ValueError(f"message {number}: a system message comes first")
        if not message.parts:
            raise ValueError(f"message {number}: empty")
        if message.role != "user" and AUDIO in message.parts:
            raise ValueError(f"message {number}: only users speak")
