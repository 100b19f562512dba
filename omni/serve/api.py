"""The HTTP interface: OpenAI's transcriptions and chat completions, models, health, metrics."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from omni.inference.formats import FORMATS, MEDIA, TIMED, render, whole_text
from omni.model.chat_template import Message
from omni.model.lm.sampling import Sampling
from omni.serve.answers import Opened, RefusedRequest, Reply, Span
from omni.serve.chat import parse_chat
from omni.serve.guard import Counters, Guard, error_body
from omni.serve.sampled import make_sampling
from omni.serve.settings import ServeSettings

_log = logging.getLogger(__name__)
_FAILED = "the server failed; its log says why"
_FIELDS = {
    *("file", "model", "language", "response_format", "stream", "temperature", "seed"),
    "timestamp_granularities[]",
}


class Model(Protocol):
    """Answer requests. Every method may raise RefusedRequest."""

    def spans(
        self, data: bytes, language: str | None, timed: bool, sampling: Sampling
    ) -> AsyncIterator[Opened | Span]:
        """Yield the length of a recording, then what is said in it as soon as it is known."""
        ...

    def reply(
        self,
        messages: list[Message],
        recordings: list[bytes],
        limit: int | None,
        sampling: Sampling,
        stream: bool,
    ) -> AsyncIterator[str | Reply]:
        """Answer a conversation: yield the whole answer, after words of its beginning if `stream`,
        as soon as they are known."""
        ...

    async def healthy(self) -> bool: ...


def make_app(model: Model, settings: ServeSettings) -> FastAPI:
    """Build the web application."""
    app = FastAPI(title="omni", docs_url=None, redoc_url=None, openapi_url=None)
    counters = Counters()
    app.add_middleware(Guard, settings=settings, counters=counters)

    @app.exception_handler(RefusedRequest)
    async def refused(request: Request, error: RefusedRequest) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(_FAILED, 500), 500)

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse((files("omni.serve") / "page.html").read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> Response:
        ready = await model.healthy()
        return JSONResponse({"status": "ok" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        entry = {"id": settings.model, "object": "model", "created": 0, "owned_by": "omni"}
        return JSONResponse({"object": "list", "data": [entry]})

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        asked = await _parse_form(request)
        _check_model(asked.model, settings)
        timed = asked.format in TIMED
        spans_of = model.spans(asked.data, asked.language, timed, asked.sampling)
        found = _counted(spans_of, counters)
        opened = await anext(found)
        assert isinstance(opened, Opened)
        spans = (item async for item in found if isinstance(item, Span))
        if asked.stream:
            return await _stream(_transcript_events(spans))
        heard = [span async for span in spans]
        language = asked.language or settings.language
        written = render(heard, asked.format, language, opened.seconds)
        if isinstance(written, str):
            return PlainTextResponse(written, media_type=MEDIA[asked.format])
        return JSONResponse(written)

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:
            raise RefusedRequest("expected a body of JSON") from None
        asked = parse_chat(body)
        _check_model(asked.model, settings)
        given = (asked.messages, asked.recordings, asked.limit, asked.sampling, asked.stream)
        replies = model.reply(*given)
        base = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": settings.model,
        }
        if asked.stream:
            return await _stream(_chat_events(base, replies))
        [reply] = [item async for item in replies]
        assert isinstance(reply, Reply)
        reason = "length" if reply.cut else "stop"
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**base, "object": "chat.completion", "choices": [choice]})

    return app


def _check_model(name: str | None, settings: ServeSettings) -> None:
    """Raise RefusedRequest for another model than the one that is here."""
    if name not in (None, "", settings.model):
        raise RefusedRequest(f"model: {name} is not here; expected {settings.model}", 404, "model")


@dataclass(frozen=True)
class _Asked:
    data: bytes
    model: str | None
    language: str | None
    format: Any
    stream: bool
    sampling: Sampling


async def _parse_form(request: Request) -> _Asked:
    """Read the form of a transcription. Raises RefusedRequest naming the field."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise RefusedRequest(f"expected multipart/form-data, got {kind or 'no content type'}")
    async with request.form(max_files=1, max_fields=20) as form:
        for name in form:
            if name not in _FIELDS:
                raise RefusedRequest(f"{name}: not supported", field=name)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise RefusedRequest("file: expected a recording", field="file")
        wanted = form.get("response_format") or "json"
        if wanted not in FORMATS:
            expected = ", ".join(FORMATS)
            raise RefusedRequest(
                f"response_format: expected one of {expected}; got {wanted!r}",
                field="response_format",
            )
        sampling = make_sampling(
            _number(form, "temperature", float), None, _number(form, "seed", int), hottest=1.0
        )
        for granularity in form.getlist("timestamp_granularities[]"):
            if granularity != "segment":
                raise RefusedRequest(
                    f"timestamp_granularities: expected segment, got {granularity!r}",
                    field="timestamp_granularities",
                )
        stream = str(form.get("stream", "")).lower() in ("true", "1")
        if stream and wanted != "json":
            raise RefusedRequest(
                f"response_format: expected json with stream, got {wanted!r}",
                field="response_format",
            )
        model, language = (form.get(name) or None for name in ("model", "language"))
        return _Asked(
            await file.read(),
            None if model is None else str(model),
            None if language is None else str(language),
            wanted,
            stream,
            sampling,
        )


def _number(form: Mapping[str, Any], name: str, kind: Callable[[str], float]) -> float | None:
    """Read a number of a form; None where it is missing. Raises RefusedRequest."""
    text = form.get(name)
    if text is None or text == "":
        return None
    try:
        return kind(str(text))
    except ValueError:
        raise RefusedRequest(f"{name}: expected a number, got {text!r}", field=name) from None


async def _counted(
    items: AsyncIterator[Opened | Span], counters: Counters
) -> AsyncIterator[Opened | Span]:
    async for item in items:
        if isinstance(item, Span):
            counters.audio.inc(item.duration)
        yield item


async def _stream(events: AsyncIterator[str]) -> Response:
    """Send events; what is refused before the first one is an error with its own status."""
    first = await anext(events)

    async def every() -> AsyncIterator[str]:
        yield first
        try:
            async for event in events:
                yield event
        except RefusedRequest as error:  # The status is sent already.
            yield _event({"type": "error", **error_body(str(error), error.status, error.field)})
        except Exception:
            _log.exception("a stream failed")
            yield _event({"type": "error", **error_body(_FAILED, 500)})

    return StreamingResponse(every(), media_type="text/event-stream")


async def _transcript_events(spans: AsyncIterator[Span]) -> AsyncIterator[str]:
    heard: list[Span] = []
    async for span in spans:
        before = whole_text(heard)
        heard.append(span)
        delta = whole_text(heard).removeprefix(before)
        cut = {"cut": True} if span.cut else {}
        yield _event({"type": "transcript.text.delta", "delta": delta, **cut})
    cut = {"cut": True} if any(span.cut for span in heard) else {}
    yield _event({"type": "transcript.text.done", "text": whole_text(heard), **cut})
    yield "data: [DONE]\n\n"


async def _chat_events(
    base: Mapping[str, Any], replies: AsyncIterator[str | Reply]
) -> AsyncIterator[str]:
    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**base, "object": "chat.completion.chunk", "choices": [choice]})

    sent = ""
    async for item in replies:
        if not sent:
            yield chunk({"role": "assistant", "content": ""})
        if isinstance(item, Reply) and not item.text.startswith(sent):
            raise RuntimeError("the answer does not begin with the words that were sent of it")
        text = item if isinstance(item, str) else item.text[len(sent) :]
        yield chunk({"content": text})
        sent += text
        if isinstance(item, Reply):
            yield chunk({}, "length" if item.cut else "stop")
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _refusal(error: RefusedRequest) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error_body(str(error), error.status, error.field), error.status, headers)
