"""Answers of many requests side by side: those that come late, that fail, that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from omni.checkpoint.base import checkpoint_folder
from omni.inference.transcriber import Transcriber
from omni.model.chat_template import transcription
from omni.model.decode import Request
from omni.serve.answers import Answers, Piece
from omni.serve.writer import Writer, settled

pytestmark = pytest.mark.unit
FILES = sorted(Path("omni/assets/prompts-en/audio").glob("*"))[:10]
SECONDS = 60.0


class Watched(Answers):
    """Answers that note how many pieces were encoded together, and can be held up."""

    def __init__(self, transcriber: Transcriber) -> None:
        super().__init__(transcriber, 60.0)
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()

    def requests(self, pieces: Sequence[Piece]) -> list[Request]:
        self.batches.append(len(pieces))
        self.open.wait(SECONDS)
        return super().requests(pieces)


@pytest.fixture(scope="module")
def tiny() -> Transcriber:
    return Transcriber.load(checkpoint_folder("omni-tiny"))


@pytest.fixture
def answers(tiny: Transcriber) -> Watched:
    return Watched(tiny)


@pytest.fixture
def pieces(answers: Watched) -> list[Piece]:
    found = []
    for file in FILES:
        [piece] = [p for p in answers.split(file.read_bytes(), None, False) if isinstance(p, Piece)]
        found.append(piece)
    return found


def test_answers_do_not_depend_on_the_places(answers: Watched, pieces: list[Piece]) -> None:
    alone, crowded = Writer(answers, 1), Writer(answers, 3)
    together = [crowded.add(piece) for piece in pieces]
    assert [answer.result(SECONDS) for answer in together] == [
        alone.add(piece).result(SECONDS) for piece in pieces
    ]
    assert max(answers.batches) <= 3


def test_one_that_fails_takes_no_other_along(answers: Watched, pieces: list[Piece]) -> None:
    writer = Writer(answers, 16)
    good = writer.add(pieces[0]).result(SECONDS)
    answers.open.clear()
    first = writer.add(pieces[1])  # While it is encoded, the others wait, and are taken together.
    broken = writer.add(Piece(transcription("", ""), []))  # A prompt with audio that has none.
    last = writer.add(pieces[0])
    answers.open.set()
    assert last.result(SECONDS) == good
    with pytest.raises(ValueError):
        broken.result(SECONDS)
    assert first.result(SECONDS).text
    assert writer.add(pieces[0]).result(SECONDS) == good, "it goes on"


def test_what_nobody_waits_for_is_not_begun(answers: Watched, pieces: list[Piece]) -> None:
    writer = Writer(answers, 1)
    answers.open.clear()
    first, second, third = (writer.add(piece) for piece in pieces[:3])
    assert second.cancel()
    answers.open.set()
    assert first.result(SECONDS).text and third.result(SECONDS).text
    assert answers.batches == [1, 1]


def test_it_ends_after_what_it_writes(answers: Watched, pieces: list[Piece]) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    writer = Writer(answers, 2)
    [thread] = [t for t in threading.enumerate() if t.ident not in before]
    last = [writer.add(piece) for piece in pieces[:4]]
    writer.close()
    thread.join(SECONDS)
    assert not thread.is_alive() and all(answer.done() for answer in last)


def test_only_whole_words_are_settled() -> None:
    assert [settled(text) for text in ("", "pre", "press tw", "press two ")] == [
        "", "", "press", "press two",
    ]  # fmt: skip
    assert settled("按二\ufffd") == "按二" and settled("caf\ufffd") == ""
