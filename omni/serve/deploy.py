"""Run replicas of a checkpoint and the HTTP interface on Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from omni.errors import ConfigError, first_line
from omni.inference.decode_batch import Decoded
from omni.model.chat_template import Message
from omni.serve.answers import Answers, Opened, Piece, RefusedRequest, Span
from omni.serve.api import Reply, make_app
from omni.serve.settings import ServeSettings

APP = "omni"
_ATTEMPTS = 3
"""Replicas that a request is sent to, when they die under it: it may be what kills them."""
_RETRY_SECONDS = 1.0
_IN_FLIGHT = 32
"""Requests that a replica prepares at a time; their pieces share batches."""
_AHEAD = 8
"""Pieces of a request that wait to be decoded; more are not read yet."""
_HEALTH_SECONDS = 5.0
_STOP_SECONDS = 60.0
"""Seconds that answers may take to end when the server does."""


class Batches:
    """Decode pieces in a thread of their own, all those that wait at a time."""

    def __init__(self, decode: Callable[[Sequence[Piece]], list[Decoded]], most: int) -> None:
        self._decode, self._most = decode, most
        self._waiting: deque[tuple[Piece, asyncio.Future[Decoded]]] = deque()
        self._thread = ThreadPoolExecutor(1, "decode")
        self._running: asyncio.Task[None] | None = None

    def add(self, piece: Piece) -> asyncio.Future[Decoded]:
        """Add a piece; return its answer to be."""
        answer: asyncio.Future[Decoded] = asyncio.get_running_loop().create_future()
        self._waiting.append((piece, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run())
        return answer

    async def _run(self) -> None:
        while self._waiting:
            count = min(self._most, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            # Whoever asked may have gone.
            batch = [(piece, answer) for piece, answer in batch if not answer.done()]
            if not batch:
                continue
            pieces = [piece for piece, _ in batch]
            try:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(self._thread, self._decode, pieces)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), decoded in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(decoded)


class Replica:
    """One copy of the model. One thread prepares requests, another decodes them in batches."""

    def __init__(self, settings: ServeSettings) -> None:
        import torch

        from omni.checkpoint.base import checkpoint_folder
        from omni.inference.transcriber import Transcriber

        torch.set_num_threads(settings.threads)
        transcriber = Transcriber.load(
            checkpoint_folder(settings.checkpoint),
            settings.device,
            settings.max_new_tokens,
            settings.decode,
            settings.ctc_weight,
        )
        self._answers = Answers(transcriber, settings.max_seconds)
        self._batches = Batches(self._answers.decode, settings.batch)
        self._preparing = ThreadPoolExecutor(1, "prepare")

    async def spans(
        self, data: bytes, language: str | None, timed: bool
    ) -> AsyncIterator[Opened | Span]:
        """See `omni.serve.api.Model`."""
        loop = asyncio.get_running_loop()
        items = self._answers.split(data, language, timed)
        waiting: deque[tuple[Piece, asyncio.Future[Decoded]]] = deque()
        whole = False
        try:
            while waiting or not whole:
                while not whole and len(waiting) < _AHEAD:
                    item = await loop.run_in_executor(self._preparing, next, items, None)
                    if isinstance(item, Piece):
                        waiting.append((item, self._batches.add(item)))
                    elif item is None:
                        whole = True
                    else:
                        yield item
                if waiting:
                    piece, answer = waiting.popleft()
                    found = await answer
                    yield Span(piece.start, piece.seconds, found.text, found.cut)
        finally:
            for _, answer in waiting:
                answer.cancel()

    async def reply(
        self, messages: list[Message], recordings: list[bytes], limit: int | None
    ) -> Reply:
        """See `omni.serve.api.Model`."""
        loop = asyncio.get_running_loop()
        given = (messages, recordings, limit)
        piece = await loop.run_in_executor(self._preparing, self._answers.conversation, *given)
        found = await self._batches.add(piece)
        return Reply(found.text, found.cut)

    async def healthy(self) -> bool:
        """See `omni.serve.api.Model`."""
        return True


class Replicas:
    """The replicas as one model: a request whose replica dies is answered by another.

    Answers are deterministic, so that one that was half sent goes on where it stopped.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._open = 0

    async def spans(
        self, data: bytes, language: str | None, timed: bool
    ) -> AsyncIterator[Opened | Span]:
        """See `omni.serve.api.Model`."""
        sent = 0
        for attempt in range(_ATTEMPTS):
            try:
                with self._counted():
                    stream = self._handle.options(stream=True).spans.remote(data, language, timed)
                    seen = 0
                    async for item in stream:
                        seen += 1
                        if seen > sent:
                            sent = seen
                            yield item
                return
            except Exception as error:
                await _wait_or_raise(error, attempt)

    async def reply(
        self, messages: list[Message], recordings: list[bytes], limit: int | None
    ) -> Reply:
        """See `omni.serve.api.Model`."""
        for attempt in range(_ATTEMPTS):
            try:
                with self._counted():
                    found: Reply = await self._handle.reply.remote(messages, recordings, limit)
                return found
            except Exception as error:
                await _wait_or_raise(error, attempt)
        raise RefusedRequest("no replica answered", 503)

    async def healthy(self) -> bool:
        """See `omni.serve.api.Model`. Replicas that are busy count as healthy."""
        try:
            found: bool = await asyncio.wait_for(self._handle.healthy.remote(), _HEALTH_SECONDS)
            return found
        except BackPressureError:
            return True
        except TimeoutError:
            return self._open > 0
        except Exception:  # Whatever the reason, none answers.
            return False

    @contextlib.contextmanager
    def _counted(self) -> Any:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


async def _wait_or_raise(error: Exception, attempt: int) -> None:
    """Wait before another attempt after the death of a replica; raise for any other error."""
    if isinstance(error, BackPressureError):
        raise RefusedRequest("too many requests wait for an answer; try again later", 429) from None
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RefusedRequest):
        raise RefusedRequest(cause.message, cause.status, cause.field) from None
    died = isinstance(error, RayActorError | DeploymentUnavailableError)
    if not died:
        raise error
    if attempt + 1 == _ATTEMPTS:
        raise RefusedRequest("the replicas died while they answered this", 503) from error
    await asyncio.sleep(_RETRY_SECONDS * (attempt + 1))


class Front:
    """The HTTP interface in front of the replicas."""

    def __init__(self, handle: Any, settings: ServeSettings) -> None:
        self._model, self._settings = Replicas(handle), settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._model, self._settings)


def build(settings: ServeSettings) -> Any:
    """Build the application of Ray Serve."""
    replica = serve.deployment(
        name="model",
        num_replicas=settings.replicas,
        max_ongoing_requests=_IN_FLIGHT,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )(Replica)
    front = serve.deployment(
        name="http",
        max_ongoing_requests=10_000,  # Those that wait for the model are counted there.
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Front))
    return front.bind(replica.bind(settings), settings)


def start(settings: ServeSettings) -> str:
    """Start Ray, or connect to RAY_ADDRESS, and the server; return its address.

    Raises ConfigError where the cluster has too little or a server of its own, RuntimeError where
    the replicas do not start.
    """
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        need = round(settings.replicas * settings.cpus) + 2
        cpus = max(os.cpu_count() or 1, need)
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    ray.init(**options)
    try:
        _check_cluster(settings)
        serve.start(
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"log_level": logging.ERROR},
        )
        serve.run(build(settings), name=APP, route_prefix="/", blocking=False)
    except ConfigError:
        ray.shutdown()
        raise
    except Exception as error:
        shut_down()
        raise RuntimeError(f"the server did not start: {first_line(error)}") from error
    return f"http://{settings.host}:{settings.port}"


def _check_cluster(settings: ServeSettings) -> None:
    """Raise ConfigError where the replicas have no room, or Ray Serve has other applications."""
    there = ray.cluster_resources()
    for name, resource, each in (
        ("gpus", "GPU", settings.gpus),
        ("cpus", "CPU", settings.cpus),
    ):
        needed = settings.replicas * each
        if needed > there.get(resource, 0):
            raise ConfigError(
                f"--replicas, --{name}: {settings.replicas} of {each:g} need {needed:g} "
                f"{resource}; there are {there.get(resource, 0):g}"
            )
    status = serve.status()
    if status.applications or status.proxies:
        raise ConfigError(
            "RAY_ADDRESS: Ray Serve runs on this cluster already, with an address and applications "
            "of its own; expected a cluster without it"
        )


def wait_for_signal(stop: Callable[[], None]) -> None:
    """Wait for Ctrl-C or SIGTERM, then call `stop`."""
    asked = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    while not asked.wait(1):
        pass
    stop()


def shut_down() -> None:
    """End the server after the answers that it is writing, and the cluster if it is our own."""
    with contextlib.suppress(Exception):  # It may not have started, or not end in time.
        serve.delete(APP)
        if os.environ.get("RAY_ADDRESS"):
            serve.shutdown()
    ray.shutdown()
