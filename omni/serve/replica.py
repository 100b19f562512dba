"""One copy of the model that answers requests, and all copies as one model."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from omni.checkpoint.base import checkpoint_folder
from omni.inference.decode_batch import Decoded
from omni.inference.transcriber import Transcriber
from omni.model.chat_template import Message
from omni.model.decode import DecodingOptions
from omni.model.lm.sampling import Sampling
from omni.serve.answers import Answers, Opened, Piece, RefusedRequest, Reply, Span
from omni.serve.settings import ServeSettings
from omni.serve.writer import Writer, write_reply

_ATTEMPTS = 3
"""Replicas that a request is sent to, when they die under it: it may be what kills them."""
_RETRY_SECONDS = 1.0
_AHEAD = 8
"""Pieces of a request that wait to be decoded; more are not read yet."""
_HEALTH_SECONDS = 5.0


class Replica:
    """One copy of the model. One thread prepares requests, another writes their answers."""

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.threads)
        transcriber = Transcriber.load(
            checkpoint_folder(settings.checkpoint),
            settings.device,
            DecodingOptions(
                settings.max_new_tokens, settings.decode, settings.ctc_weight, settings.beam
            ),
        )
        self._answers = Answers(transcriber, settings.max_seconds)
        self._writer = Writer(self._answers, settings.batch)
        self._preparing = ThreadPoolExecutor(1, "prepare")

    async def spans(
        self, data: bytes, language: str | None, timed: bool, sampling: Sampling
    ) -> AsyncIterator[Opened | Span]:
        """See `omni.serve.api.Model`."""
        loop = asyncio.get_running_loop()
        items = self._answers.split(data, language, timed, sampling)
        waiting: deque[tuple[Piece, asyncio.Future[Decoded]]] = deque()
        whole = False
        try:
            while waiting or not whole:
                while not whole and len(waiting) < _AHEAD:
                    item = await loop.run_in_executor(self._preparing, next, items, None)
                    if isinstance(item, Piece):
                        waiting.append((item, asyncio.wrap_future(self._writer.add(item))))
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
        self,
        messages: list[Message],
        recordings: list[bytes],
        limit: int | None,
        sampling: Sampling,
        stream: bool,
    ) -> AsyncIterator[str | Reply]:
        """See `omni.serve.api.Model`."""
        loop = asyncio.get_running_loop()
        given = (messages, recordings, limit, sampling)
        piece = await loop.run_in_executor(self._preparing, self._answers.conversation, *given)
        async for item in write_reply(self._writer, piece, stream):
            yield item

    async def healthy(self) -> bool:
        """See `omni.serve.api.Model`."""
        return self._writer.alive


class Replicas:
    """The replicas as one model: a request whose replica dies is answered by another.

    An answer of which a part was sent continues there. The other replica draws by the same seed,
    but its batch rounds otherwise: a request whose answer comes to differ is refused.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._open = 0

    async def spans(
        self, data: bytes, language: str | None, timed: bool, sampling: Sampling
    ) -> AsyncIterator[Opened | Span]:
        """See `omni.serve.api.Model`."""
        sent = 0
        for attempt in range(_ATTEMPTS):
            try:
                with self._counted():
                    spans = self._handle.options(stream=True).spans
                    stream = spans.remote(data, language, timed, sampling)
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
        self,
        messages: list[Message],
        recordings: list[bytes],
        limit: int | None,
        sampling: Sampling,
        stream: bool,
    ) -> AsyncIterator[str | Reply]:
        """See `omni.serve.api.Model`."""
        sent = ""
        for attempt in range(_ATTEMPTS):
            try:
                with self._counted():
                    replies = self._handle.options(stream=True).reply
                    again = ""
                    async for item in replies.remote(messages, recordings, limit, sampling, stream):
                        again = again + item if isinstance(item, str) else item.text
                        if not (again.startswith(sent) or sent.startswith(again)):
                            raise RefusedRequest("another replica answers in other words", 503)
                        if isinstance(item, Reply):
                            yield item
                        elif len(again) > len(sent):
                            new, sent = again[len(sent) :], again
                            yield new
                return
            except Exception as error:
                await _wait_or_raise(error, attempt)

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
