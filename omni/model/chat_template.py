"""Render messages to token ids and mark which are audio, given text and supervised text.

A template defines the tokens between the contents of messages. `plain` is the sequence

    | audio | <|bos|> | prompt | text | end |

and `chat` is that of the tokenizer: nanochat's, or the Jinja template of a transformers tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from omni.model.special_marks import AUDIO as AUDIO
from omni.model.special_marks import AUDIO_MARK, MARK, MarkedIds, check_text
from omni.model.tokenizer import SpeechTokenizer

PLACEHOLDER = "<|audio|>"  # position of the recording in a prompt
Kind = Literal["plain", "chat"]
Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")
_SOME_ANSWER = "x"  # stands for an answer that is yet to be written
_PADDING = ("\t", "\v")  # white space of two kinds that templates do not write
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


@dataclass(frozen=True)
class _Chat:
    """Texts that a chat template writes around the parts of messages, with marks."""

    between: list[str]
    """Before, between and after the parts."""
    stripped: list[tuple[bool, bool]]
    """True where the template removes white space at the beginning, at the end of a part."""


@dataclass
class _Written:
    """A rendered conversation. answers: (first, last) characters to be learnt."""

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)


class RefusedRow(ValueError):
    """A template cannot render a conversation. number: its position among those given."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


class Template:
    """Renders messages with one tokenizer and one kind of template.

    end: id of the special token that ends an answer; text is never encoded as it. Raises
    ValueError where the chat template leaves out or reorders messages, or does not end an answer.

    The ids are those that transformers' `apply_chat_template` returns, with a special token in the
    place of each recording, up to the end of the last answer.
    """

    def __init__(self, tokenizer: SpeechTokenizer, kind: Kind = "plain") -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self._glue: dict[Shape, list[list[int]]] = {}
        self._chats: dict[Shape, _Chat] = {}
        self._joint = (
            kind == "chat"
            and tokenizer.chat_template is not None
            and tokenizer.rendering is not None
        )
        if self._joint:
            self._end_mark = self._find_end_mark()
            self.end = tokenizer.token_id(tokenizer.marks.name(self._end_mark))
            return
        turn = self._between(_shape(transcription("", "x")))
        if not turn[-1]:
            raise ValueError(
                "the chat template has no token after an answer: its end cannot be learnt"
            )
        self.end = turn[-1][0]

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Render whole conversations; the end token of the last answer is the last id.

        Raises RefusedRow for messages that the chat template refuses, leaves out or reorders.
        """
        if self._joint:
            return self._render_chats(conversations)
        merged = [self._merged(messages) for messages in conversations]
        for number, messages in enumerate(merged):
            try:
                self._between(_shape(messages))
            except ValueError as error:
                raise RefusedRow(number, str(error)) from None
        texts = [part for m in merged for message in m for part in message.parts if part != AUDIO]
        # Most prompts repeat, so each distinct text is encoded once.
        distinct = list(dict.fromkeys(map(str, texts)))
        encoded = dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))
        ids = (encoded[str(text)] for text in texts)
        return [self._assemble(messages, ids) for messages in merged]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids before the last answer, whatever that will be. Raises as `render`."""
        *given, last = messages
        answer = Message(last.role, (_SOME_ANSWER,))
        rendered = self.render([[*given, answer]])[0]
        length = len(rendered.ids)
        while length and rendered.supervised[length - 1]:
            length -= 1
        return rendered.ids[:length]

    # -- chat templates of transformers --------------------------------------------------------

    def _find_end_mark(self) -> str:
        """Find the special token after an answer. Raises ValueError where there is none."""
        after = self._chat(_shape(transcription("", "x"))).between[-1]
        found = MARK.search(after)
        if found is None:
            raise ValueError(
                f"the chat template writes no special token after an answer, but {after!r}: its "
                "end cannot be learnt; expected one such as the tokenizer's end-of-sequence token"
            )
        return found[0]

    def _render_chats(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        written = []
        for number, messages in enumerate(conversations):
            try:
                written.append(self._write(messages))
            except ValueError as error:
                raise RefusedRow(number, str(error)) from None
        encoded = self.tokenizer.encode_marked([chat.text for chat in written])
        return [
            self._supervise(chat, self._divided(chat, ids))
            for chat, ids in zip(written, encoded, strict=True)
        ]

    def _divided(self, chat: _Written, encoded: MarkedIds) -> MarkedIds:
        """Encode once more where a token holds the end of a prompt and the answer's beginning.

        The prompt has to be the same whatever the answer is.
        """
        begins = [first for first, _ in chat.answers]
        if not any(
            a < begin < b and chat.text[begin:b].strip()
            for begin in begins
            for a, b in encoded.spans
        ):
            return encoded
        cuts = [0, *begins, len(chat.text)]
        pieces = [chat.text[a:b] for a, b in pairwise(cuts)]
        divided = MarkedIds([], [])
        for shift, found in zip(cuts, self.tokenizer.encode_marked(pieces), strict=False):
            divided.ids.extend(found.ids)
            divided.spans.extend((a + shift, b + shift) for a, b in found.spans)
        return divided

    def _write(self, messages: Sequence[Message]) -> _Written:
        """Write a conversation as one text, with marks for special tokens and recordings."""
        chat = self._chat(_shape(messages))
        text, number = chat.between[0], 0
        written = _Written("")
        for message in messages:
            first = len(text.rstrip(" "))  # Tokens hold the space before a word.
            for part in message.parts:
                left, right = chat.stripped[number]
                content = AUDIO_MARK if part == AUDIO else check_text(str(part))
                content = content.lstrip() if left else content
                text += content.rstrip() if right else content
                number += 1
                end = len(text)
                text += chat.between[number]
            if message.role == "assistant":
                mark = MARK.search(text, end)
                if mark is None or mark[0] != self._end_mark:
                    names = [self.tokenizer.marks.name(m[0]) for m in [mark] if m is not None]
                    expected = self.tokenizer.marks.name(self._end_mark)
                    raise ValueError(
                        f"the chat template ends an answer with {names[0] if names else 'nothing'}"
                        f", and the last one with {expected}"
                    )
                written.answers.append((first, mark.end()))
        written.text = text
        return written

    def _supervise(self, chat: _Written, encoded: MarkedIds) -> Rendered:
        """Mark the ids of answers, and cut off what follows the last one."""
        rendered = Rendered([], [])
        answers = iter(chat.answers)
        first, last = next(answers)
        for i, (start, _) in zip(encoded.ids, encoded.spans, strict=True):
            while start >= last:
                following = next(answers, None)
                if following is None:
                    return rendered
                first, last = following
            rendered.ids.append(i)
            rendered.supervised.append(start >= first)
        return rendered

    def _chat(self, shape: Shape) -> _Chat:
        if shape not in self._chats:
            padded = self._pieces(shape, *_PADDING)
            stripped: list[tuple[bool, bool]] = []
            for _, parts in shape:
                for number in range(len(stripped), last := len(stripped) + len(parts)):
                    left = not padded[number].endswith(_PADDING[0])
                    right = not padded[number + 1].startswith(_PADDING[1])
                    outer = (number == last - len(parts), number == last - 1)
                    stripped.append((left and outer[0], right and outer[1]))
            between = map(self.tokenizer.marks.mark, self._pieces(shape))
            self._chats[shape] = _Chat(list(between), stripped)
        return self._chats[shape]

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
        """Encode the texts of a chat template apart, as older versions did."""
        return [self.tokenizer.encode_markup(piece) for piece in self._pieces(shape)]

    def _pieces(self, shape: Shape, before: str = "", after: str = "") -> list[str]:
        """Render a shape, and return the texts around its parts.

        before, after: added to each message, to learn whether the template strips white space.
        """
        messages: list[dict[str, str]] = []
        sentinels: list[str] = []
        for role, parts in shape:
            fresh = [chr(_SENTINEL + len(sentinels) + i) for i in range(len(parts))]
            sentinels += fresh
            messages.append({"role": role, "content": before + "".join(fresh) + after})
        text = self.tokenizer.render_chat(messages)
        pieces = []
        for sentinel in sentinels:
            piece, found, text = text.partition(sentinel)
            if not found:
                raise ValueError("the chat template leaves out a message, or changes their order")
            pieces.append(piece)
        return [*pieces, text]


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
