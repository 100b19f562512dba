"""Answers of many requests side by side: those that come late, that fail, that nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omni.checkpoint.base import checkpoint_folder
from omni.inference.transcriber import Transcriber
from omni.model.chat_template import transcription
from omni.model.decode import Decoding, Request
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
    while not answers.batches[1:]:
        time.sleep(0.01)
    silent = writer.add(Piece(transcription("", ""), []))  # A prompt with audio that has none.
    broken = writer.add(Piece(pieces[0].messages, [np.zeros((2, 2, 2), np.float32)]))
    last = writer.add(pieces[0])
    answers.open.set()
    assert last.result(SECONDS) == good
    for wrong in (silent, broken):
        with pytest.raises((ValueError, RuntimeError)):
            wrong.result(SECONDS)
    assert first.result(SECONDS).text
    assert writer.add(pieces[0]).result(SECONDS) == good, "it goes on"
    assert answers.batches == [1, 1, 3, 1, 1, 1, 1], "together, and then one by one"


def test_a_client_that_has_gone_takes_no_other_along(
    tiny: Transcriber, pieces: list[Piece]
) -> None:
    by_lm = replace(tiny, decoding=Decoding("lm", max_new_tokens=40))
    writer = Writer(Answers(by_lm, 60.0), 16)
    wanted = [writer.add(piece).result(SECONDS) for piece in pieces[:2]]

    def gone(words: str) -> None:
        raise RuntimeError("event loop is closed")

    assert [writer.add(p, gone).result(SECONDS) for p in pieces[:2]] == wanted and writer.alive


def test_a_limit_of_a_request_holds_where_the_training_set_none(
    tiny: Transcriber, pieces: list[Piece]
) -> None:
    old = Writer(Answers(replace(tiny, decoding=Decoding("lm")), 60.0), 16)
    longest = max(pieces, key=lambda piece: piece.seconds)
    whole = old.add(longest).result(SECONDS)
    assert whole.tokens > 3 and not whole.cut
    short = old.add(replace(longest, limit=3)).result(SECONDS)
    assert short.tokens == 3 and short.cut and whole.text.startswith(short.text)
    assert old.add(replace(longest, limit=500)).result(SECONDS) == whole


def test_features_are_those_of_the_training(tiny: Transcriber, pieces: list[Piece]) -> None:
    in_bf16 = Answers(replace(tiny, bf16=True), 60.0)
    [piece] = pieces[:1]
    [request] = in_bf16.requests([piece])
    assert torch.equal(request.features[0], tiny.features_of(piece.recordings[0]))


def test_words_are_certain_only_where_nothing_else_can_be_chosen(
    tiny: Transcriber, pieces: list[Piece]
) -> None:
    longest = max(pieces, key=lambda piece: piece.seconds)

    def sent_early(decoding: Decoding) -> list[str]:
        answers = Answers(replace(tiny, decoding=decoding), 60.0)
        words: list[str] = []
        assert Writer(answers, 4).add(longest, words.append).result(SECONDS).text
        return words

    assert sent_early(Decoding("lm"))
    assert sent_early(Decoding("joint")) == sent_early(Decoding("lm", beam=2)) == []


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
    with pytest.raises(RuntimeError):
        writer.add(pieces[0])


def test_only_whole_words_are_settled() -> None:
    assert [settled(text) for text in ("", "pre", "press tw", "press two ")] == [
        "", "", "press", "press two",
    ]  # fmt: skip
    assert settled("按二\ufffd") == "按二" and settled("caf\ufffd") == ""
