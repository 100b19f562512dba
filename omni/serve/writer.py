"""Write the answers to the pieces of many requests side by side.

A piece takes a free place in the batch as soon as there is one, whatever else is being written.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from omni.inference.decode_batch import Decoded
from omni.inference.transcriber import ENCODE_BATCH
from omni.model.decode import Engine
from omni.serve.answers import Answers, Piece, Reply

Tell = Callable[[str], None]


@dataclass(eq=False)
class _Open:
    """A piece whose answer is not whole. tell: is called with the words that follow `told`."""

    piece: Piece
    tell: Tell | None
    answer: Future[Decoded] = field(default_factory=Future)
    told: str = ""


class Writer:
    """Answer pieces in a thread of its own."""

    def __init__(self, answers: Answers, places: int) -> None:
        """places: answers that are written at a time; a beam takes several of them."""
        self._answers, self._places = answers, places
        self._waiting: deque[_Open] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._engines: dict[int, Engine] = {}
        """By width of the beam: what is drawn has none."""
        self._written: dict[int, dict[int, _Open]] = {}
        """What each engine writes, by key."""
        self._count = 0
        threading.Thread(target=self._run, name="write", daemon=True).start()

    def add(self, piece: Piece, tell: Tell | None = None) -> Future[Decoded]:
        """Add a piece; return its answer to be.

        tell: called in the thread with words as soon as they are sure to be in the answer, each
        once. Words that may yet give way to those of the CTC head or another hypothesis are not.
        """
        opened = _Open(piece, tell)
        with self._changed:
            self._waiting.append(opened)
            self._changed.notify()
        return opened.answer

    def close(self) -> None:
        """End the thread after the answers that it is writing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            # Whoever asked may have gone.
            self._begin([o for o in taken if o.answer.set_running_or_notify_cancel()])
            for width in [width for width, engine in self._engines.items() if engine.busy]:
                try:
                    self._step(width)
                except Exception as error:
                    self._drop(width, error)

    def _take(self) -> list[_Open] | None:
        """Take pieces that there is room for; wait where there is nothing to do. None: the end."""
        with self._changed:
            while not (self._waiting or self._closed or self._busy):
                self._changed.wait()
            if self._closed and not (self._waiting or self._busy):
                return None
            room = self._places - sum(map(len, self._written.values()))
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    @property
    def _busy(self) -> bool:
        return any(self._written.values())

    def _begin(self, taken: Sequence[_Open]) -> None:
        for first in range(0, len(taken), ENCODE_BATCH):
            self._encode(taken[first : first + ENCODE_BATCH])

    def _encode(self, batch: Sequence[_Open]) -> None:
        """Encode the recordings of pieces, all in one batch, and let their answers be written."""
        try:
            requests = self._answers.requests([opened.piece for opened in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:  # One of them is to blame.
                for opened in batch:
                    self._encode([opened])
            return
        for opened, request in zip(batch, requests, strict=True):
            width = self._answers.width(opened.piece)
            if width not in self._engines:
                self._engines[width] = self._answers.engine(width, self._places)
                self._written[width] = {}
            try:
                with self._answers.computing():
                    self._engines[width].add(self._count, request)
            except Exception as error:
                opened.answer.set_exception(error)
                continue
            self._written[width][self._count] = opened
            self._count += 1

    def _step(self, width: int) -> None:
        engine, written = self._engines[width], self._written[width]
        with self._answers.computing():
            done = engine.step()
        for key, choice in done:
            opened = written.pop(key)
            opened.answer.set_result(self._answers.decoded(choice))
        for key, opened in written.items():
            if opened.tell is not None and (ids := engine.written(key)):
                self._tell(opened, opened.tell, settled(self._answers.text(ids)))

    @staticmethod
    def _tell(opened: _Open, tell: Tell, text: str) -> None:
        if len(text) > len(opened.told) and text.startswith(opened.told):
            more, opened.told = text[len(opened.told) :], text
            tell(more)

    def _drop(self, width: int, error: Exception) -> None:
        """Fail what an engine was writing, and go on with a new one."""
        logging.getLogger(__name__).error("decoding failed", exc_info=error)
        del self._engines[width]
        for opened in self._written.pop(width).values():
            opened.answer.set_exception(error)


async def write_reply(writer: Writer, piece: Piece, stream: bool) -> AsyncIterator[str | Reply]:
    """Yield the words of an answer as they are written, if `stream`, and then the whole."""
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[str | None] = asyncio.Queue()

    def put(words: str | None) -> None:
        loop.call_soon_threadsafe(told.put_nowait, words)

    answer = writer.add(piece, put if stream else None)
    answer.add_done_callback(lambda _: put(None))
    try:
        while (words := await told.get()) is not None:
            yield words
    finally:
        answer.cancel()
    found = answer.result()
    yield Reply(found.text, found.cut)


def settled(text: str) -> str:
    """Return the words that further tokens do not change: all but the last one.

    A character of a script without spaces is a word. What half a character decodes to is none.
    """
    end = len(text)
    while end and not (
        text[end - 1].isspace() or unicodedata.east_asian_width(text[end - 1]) == "W"
    ):
        end -= 1
    return text[:end].rstrip()
