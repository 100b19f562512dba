"""Check requests before they are read: the key, and the size of the body; count them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import JSONResponse

from omni.serve.settings import ServeSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_PATHS = (
    *("/", "/health", "/metrics", "/v1/models"),
    *("/v1/audio/transcriptions", "/v1/chat/completions"),
)
"""Paths that are counted by themselves."""
_OPEN = ("/", "/health")
"""Paths that need no key."""
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Counters:
    """Metrics of a server, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "omni_serve_requests", "Answered requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "omni_serve_request_seconds",
            "Seconds from a request to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.audio = Counter(
            "omni_serve_audio_seconds", "Seconds of audio written down", registry=self.registry
        )
        self.open = Gauge(
            "omni_serve_open_requests", "Requests that are being answered", registry=self.registry
        )


def error_body(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


class Guard:
    """Refuse requests without a key (401) or with too large a body (413), and count all."""

    def __init__(self, app: App, settings: ServeSettings, counters: Counters) -> None:
        self._app, self._settings, self._counters = app, settings, counters
        self._most = round(settings.max_megabytes * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._counters.open.inc()
        try:
            await self._checked(scope, receive, noting)
        finally:
            self._counters.open.dec()
            # Other paths are one, so that strangers cannot make rows.
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._counters.requests.labels(path, str(status)).inc()
            self._counters.seconds.labels(path).observe(time.perf_counter() - began)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin1").lower(): v.decode("latin1") for k, v in scope["headers"]}
        if scope["path"] not in _OPEN and not self._settings.admits(
            headers.get("authorization", "")
        ):
            body = error_body("expected a key: Authorization: Bearer KEY", 401)
            await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            await self._too_large(scope, receive, send)
            return
        read = 0
        started = False

        async def counting() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise _TooLarge
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counting, sending)
        except _TooLarge:
            if started:
                raise
            await self._too_large(scope, receive, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the request is larger than {self._settings.max_megabytes:g} MB"
        await JSONResponse(error_body(message, 413), 413)(scope, receive, send)


class _TooLarge(Exception):
    pass
