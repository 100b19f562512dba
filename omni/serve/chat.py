"""Read OpenAI's chat requests with `input_audio` parts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni.model.chat_template import AUDIO, Message, Role
from omni.model.lm.sampling import Sampling
from omni.serve.answers import RefusedRequest
from omni.serve.sampled import make_sampling

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_IGNORED = {"user", "metadata", "store"}
"""Fields that do not change an answer."""
_DRAWN = ("temperature", "top_p", "seed")
_READ = {"messages", "model", "stream", "max_tokens", "max_completion_tokens", *_DRAWN}
_HOTTEST = 2.0
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "modalities": (None, ["text"]),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "stream_options": (None, {"include_usage": False}),
}
"""Values of fields that can be honoured."""


@dataclass(frozen=True)
class ChatRequest:
    """messages: up to the answer. recordings: bytes of the audio files, in order."""

    messages: list[Message]
    recordings: list[bytes]
    limit: int | None
    stream: bool
    model: str | None
    sampling: Sampling


def parse_chat(body: Any) -> ChatRequest:
    """Read the body of a chat request. Raises RefusedRequest naming the field."""
    if not isinstance(body, Mapping):
        raise RefusedRequest("expected a JSON object")
    for name, value in body.items():
        if name in _ONLY and value not in _ONLY[name]:
            expected = " or ".join(map(repr, _ONLY[name][1:]))
            raise RefusedRequest(f"{name}: expected {expected}, got {value!r}", field=name)
        if name not in {*_ONLY, *_IGNORED, *_READ} and value is not None:
            raise RefusedRequest(f"{name}: not supported", field=name)
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise RefusedRequest("messages: expected a list of messages", field="messages")
    messages: list[Message] = []
    recordings: list[bytes] = []
    for number, message in enumerate(given):
        messages.append(_message(message, f"messages.{number}", recordings))
    if messages[-1].role != "user":
        raise RefusedRequest("messages: expected the last one to be the user's", field="messages")
    model = body.get("model")
    if not isinstance(model, str | None):
        raise RefusedRequest(f"model: expected a name, got {model!r}", field="model")
    return ChatRequest(
        messages,
        recordings,
        _limit(body),
        bool(body.get("stream")),
        model,
        make_sampling(*(body.get(name) for name in _DRAWN), hottest=_HOTTEST),
    )


def _limit(body: Mapping[str, Any]) -> int | None:
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RefusedRequest(f"{name}: expected a number of tokens, got {value!r}", field=name)
        return value
    return None


def _message(message: Any, at: str, recordings: list[bytes]) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in [*_ROLES]:
        raise RefusedRequest(f"{at}: expected a role of {', '.join(_ROLES)}", field="messages")
    content = message.get("content")
    parts: list[str | int] = []
    if not isinstance(content, str | list):
        raise RefusedRequest(f"{at}.content: expected a text or a list of parts", field="messages")
    for number, part in enumerate([_text(content)] if isinstance(content, str) else content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += [part["text"]] if part["text"] else []
        elif kind == "input_audio":
            recordings.append(_audio(part.get("input_audio"), f"{at}.content.{number}"))
            parts.append(AUDIO)
        else:
            raise RefusedRequest(
                f"{at}.content.{number}: expected a part of type text or input_audio",
                field="messages",
            )
    return Message(_ROLES[message["role"]], tuple(parts))


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _audio(given: Any, at: str) -> bytes:
    try:
        return base64.b64decode(given["data"], validate=True)
    except (TypeError, KeyError, ValueError, binascii.Error):
        raise RefusedRequest(
            f"{at}.input_audio.data: expected a recording in base64", field="messages"
        ) from None
