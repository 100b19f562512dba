"""Parse conversations of a manifest: messages with texts and recordings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from omni.model.chat_template import AUDIO, Message, check_messages, transcription

_OPTIONAL = {"offset", "duration", "text"}  # `text` is the transcript, for distillation.
_EXPECTED = 'a text, or a list of {"text": ...} and {"audio": FILE, "offset": s, "duration": s}'


def parse_messages(row: dict[str, Any]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Return the messages of a manifest row and its recordings (audio, offset, duration, text).

    Raises ValueError naming the message and what was expected.
    """
    given = row["messages"]
    if not isinstance(given, list):
        raise ValueError(f"expected a list, got {given!r}")
    messages, recordings = [], []
    for number, message in enumerate(given):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"message {number}: expected an object with role and content")
        content = message["content"]
        parts: list[str | int] = []
        for part in [{"text": content}] if isinstance(content, str) else _listed(content, number):
            if isinstance(part, dict) and isinstance(part.get("text"), str) and len(part) == 1:
                if text := part["text"]:
                    parts.append(text)
            elif isinstance(part, dict) and part.keys() - _OPTIONAL == {"audio"}:
                parts.append(AUDIO)
                recordings.append(part)
            else:
                raise ValueError(f"message {number}: content: expected {_EXPECTED}, got {part!r}")
        messages.append(Message(message["role"], tuple(parts)))
    check_messages(messages)
    if not recordings:
        raise ValueError("expected at least one recording")
    return messages, recordings


def _listed(content: Any, number: int) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError(f"message {number}: content: expected {_EXPECTED}, got {content!r}")
    return content


def messages_json(messages: list[Message]) -> str:
    """Serialise messages for the `messages` column of the index."""
    return json.dumps([[m.role, list(m.parts)] for m in messages], ensure_ascii=False)


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of an index row; without any, its prompt, recording and transcript."""
    if row["messages"] is None:
        return list(transcription(row["prompt"], row["text"]))
    return [Message(role, tuple(parts)) for role, parts in json.loads(row["messages"])]


def answer_of(messages: list[Message]) -> str:
    """Return the last answer, which a decoder has to write."""
    return "".join(str(part) for part in messages[-1].parts)
