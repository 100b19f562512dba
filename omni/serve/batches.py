"""Decode the pieces of many requests together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from omni.inference.decode_batch import Decoded
from omni.serve.answers import Piece


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
