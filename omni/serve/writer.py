"""Write the answers to the pieces of many requests side by side.

A piece takes a free place in the batch as soon as there is one, whatever else is being written.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from omni.inference.decode_batch import Decoded
from omni.inference.transcriber import ENCODE_BATCH
from omni.model.decode import Choice, Engine
from omni.serve.answers import Answers, Piece, Reply

Send = Callable[[str], None]
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Open:
    """A piece whose answer is not complete. send: called with the words that follow `sent`."""

    piece: Piece
    send: Send | None
    answer: Future[Decoded] = field(default_factory=Future)
    sent: str = ""


class Writer:
    """Answer pieces in a thread of its own."""

    def __init__(self, answers: Answers, places: int) -> None:
        """places: hypotheses that are extended at a time: one of each answer, or a beam of it."""
        self._answers, self._places = answers, places
        self._waiting: list[_Open] = []
        self._changed = threading.Condition()
        self._closed = False
        self._engines: dict[int, Engine] = {}
        """By width of the beam, which is 1 for answers that are drawn."""
        self._written: dict[int, dict[int, _Open]] = {}
        """Pieces in each engine, by key."""
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def add(self, piece: Piece, send: Send | None = None) -> Future[Decoded]:
        """Add a piece; return the future of its answer. Raises RuntimeError after `close`.

        send: called in the thread with words of the answer, each once, as soon as they are certain:
        not while the answer of the CTC head or another hypothesis may be chosen.
        """
        opened = _Open(piece, send)
        with self._changed:
            if self._closed or not self.alive:
                raise RuntimeError("the model has stopped")
            self._waiting.append(opened)
            self._changed.notify()
        return opened.answer

    def close(self) -> None:
        """End the thread after the answers that it has been given."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            # The client may have gone.
            self._begin([o for o in taken if o.answer.set_running_or_notify_cancel()])
            for width in [width for width, engine in self._engines.items() if engine.busy]:
                try:
                    self._step(width)
                except Exception as error:
                    self._drop(width, error)

    def _take(self) -> list[_Open] | None:
        """Take pieces that there is room for; wait where there is no work. None: the end."""
        with self._changed:
            while not (self._waiting or self._closed or self._busy):
                self._changed.wait()
            if self._closed and not (self._waiting or self._busy):
                return None
            taken: list[_Open] = []
            left: list[_Open] = []
            room: dict[int, int] = {}
            for opened in self._waiting:
                width = self._answers.width(opened.piece)
                free = room.setdefault(width, self._free(width))
                (taken if free else left).append(opened)
                room[width] = max(0, free - 1)
            self._waiting = left
            return taken

    def _free(self, width: int) -> int:
        engine = self._engines.get(width)
        return max(1, self._places // width) if engine is None else engine.free

    @property
    def _busy(self) -> bool:
        return any(self._written.values())

    def _begin(self, taken: Sequence[_Open]) -> None:
        for first in range(0, len(taken), ENCODE_BATCH):
            self._encode(taken[first : first + ENCODE_BATCH])

    def _encode(self, batch: Sequence[_Open]) -> None:
        """Encode the recordings of pieces in one batch, and add them to their engines."""
        try:
            requests = self._answers.requests([opened.piece for opened in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:  # One of them is the cause.
                for opened in batch:
                    self._encode([opened])
            return
        for opened, request in zip(batch, requests, strict=True):
            width = self._answers.width(opened.piece)
            try:
                engine = self._engines.get(width) or self._answers.engine(width, self._places)
                with self._answers.computing():
                    engine.add(self._count, request)
            except Exception as error:
                opened.answer.set_exception(error)
                continue
            self._engines[width] = engine
            self._written.setdefault(width, {})[self._count] = opened
            self._count += 1

    def _step(self, width: int) -> None:
        engine, written = self._engines[width], self._written[width]
        with self._answers.computing():
            done = engine.step()
        for key, choice in done:
            self._finish(written.pop(key), choice)
        for key, opened in written.items():
            if opened.send is not None and (ids := engine.written(key)):
                self._send(opened, opened.send, ids)

    def _finish(self, opened: _Open, choice: Choice) -> None:
        try:
            found = self._answers.decoded(choice)
            if not found.text.startswith(opened.sent):
                raise RuntimeError("the answer does not begin with the words that were sent of it")
            opened.answer.set_result(found)
        except Exception as error:
            opened.answer.set_exception(error)

    def _send(self, opened: _Open, send: Send, ids: Sequence[int]) -> None:
        try:
            text = settled(self._answers.text(ids))
            if len(text) > len(opened.sent) and text.startswith(opened.sent):
                more, opened.sent = text[len(opened.sent) :], text
                send(more)
        except Exception as error:  # Of this request alone, whose client may have gone.
            _log.warning("words could not be sent: %s", error)
            opened.send = None

    def _drop(self, width: int, error: Exception) -> None:
        """Fail the answers of an engine; the next piece gets a new one."""
        _log.error("decoding failed", exc_info=error)
        del self._engines[width]
        for opened in self._written.pop(width).values():
            opened.answer.set_exception(error)


async def write_reply(writer: Writer, piece: Piece, stream: bool) -> AsyncIterator[str | Reply]:
    """Yield the words of an answer as they are written, if `stream`, and then the whole."""
    loop = asyncio.get_running_loop()
    words: asyncio.Queue[str | None] = asyncio.Queue()

    def put(more: str | None) -> None:
        loop.call_soon_threadsafe(words.put_nowait, more)

    answer = writer.add(piece, put if stream else None)
    answer.add_done_callback(lambda _: put(None))
    try:
        while (more := await words.get()) is not None:
            yield more
    finally:
        answer.cancel()
    found = answer.result()
    yield Reply(found.text, found.cut)


def settled(text: str) -> str:
    """Return the words that further tokens do not change: all but the last one.

    A character of a script without spaces counts as a word; half a character does not.
    """
    end = len(text)
    while end and not _ends_word(text[end - 1]):
        end -= 1
    return text[:end].rstrip()


def _ends_word(character: str) -> bool:
    return character.isspace() or unicodedata.east_asian_width(character) == "W"
