"""Answer requests with one model: recordings to timed texts, conversations to texts.

No web framework and no Ray in here; `omni.serve.replica` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from omni.audio.decode import AudioError, decode, decode_blocks, measure
from omni.audio.vad import Segmenting, speech_spans
from omni.audio.windows import SAMPLING_RATE
from omni.inference.decode_batch import Decoded, as_text, request_of, text_of
from omni.inference.formats import Span as Span  # Answers of recordings consist of them.
from omni.inference.pieces import cut_at_pauses
from omni.inference.transcriber import Transcriber, draw_number
from omni.model.chat_template import AUDIO, Message, RefusedRow, check_messages
from omni.model.decode import Choice, Engine, Request
from omni.model.lm.sampling import GREEDY, Sampling


class RefusedRequest(ValueError):
    """A request cannot be answered. status: of HTTP; field: of the request."""

    def __init__(self, message: str, status: int = 400, field: str | None = None) -> None:
        super().__init__(message, status, field)
        self.message, self.status, self.field = message, status, field

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Piece:
    """A conversation up to its answer, with its recordings, (S,) fp32 mono at 16 kHz each.

    limit: most tokens of the answer; None: that of the checkpoint.
    """

    messages: Sequence[Message]
    recordings: Sequence[np.ndarray]
    transcription: bool = True
    limit: int | None = None
    start: float = 0.0
    """Seconds from the beginning of the recording that it is a part of."""
    sampling: Sampling = GREEDY
    draw: int = 0
    """Number that the draws depend on beside the seed."""

    @property
    def seconds(self) -> float:
        return sum(map(len, self.recordings)) / SAMPLING_RATE


@dataclass(frozen=True)
class Opened:
    """A recording that can be read, and its length."""

    seconds: float


@dataclass(frozen=True)
class Reply:
    """An answer in a conversation. cut: the limit of tokens came before its end."""

    text: str
    cut: bool


class Answers:
    """Prepare requests, and the engines for them. Preparing is for one thread at a time."""

    def __init__(self, transcriber: Transcriber, longest_seconds: float) -> None:
        """longest_seconds: of a recording; a longer one is refused with status 413."""
        self._transcriber, self._longest = transcriber, longest_seconds

    def split(
        self, data: bytes, language: str | None, timed: bool, sampling: Sampling = GREEDY
    ) -> Iterator[Opened | Piece]:
        """Split a recording into pieces to be decoded; yield its length first.

        data: the bytes of an audio file. timed: at the spans of speech, whose times are wanted;
        else at pauses, where it is too long. Memory does not grow with the recording. Raises
        RefusedRequest.
        """
        self._check_language(language)
        self._check_draws(sampling)
        transcriber = self._transcriber
        try:
            seconds = measure(data) / SAMPLING_RATE
            if seconds > self._longest:
                raise RefusedRequest(
                    f"the recording lasts {seconds:.0f} s; expected at most {self._longest:g} s",
                    413,
                    "file",
                )
            yield Opened(seconds)
            longest = transcriber.longest_piece
            if timed:
                spans = speech_spans(data, Segmenting(longest=longest))
                parts = _slices(decode_blocks(data), spans)
            else:
                parts = _consecutive(cut_at_pauses(decode_blocks(data), longest))
            for number, (start, audio) in enumerate(parts):
                messages = transcriber.request("", [audio], language).messages
                # As `omni transcribe` numbers them.
                draw = draw_number(f"{start}") if timed else draw_number("", number)
                yield Piece(messages, [audio], start=start, sampling=sampling, draw=draw)
        except AudioError as error:
            raise RefusedRequest(str(error), field="file") from None

    def _check_language(self, language: str | None) -> None:
        """Raise RefusedRequest for a language that the model does not take."""
        policy = self._transcriber.policy
        if language is None or (not policy.language_tag and language == (policy.language or "en")):
            return
        if not policy.language_tag:
            raise RefusedRequest(
                f"the model was trained without language tags and writes {policy.language or 'en'} "
                f"only, got {language}",
                field="language",
            )
        try:
            policy.prompt("", language)
        except ValueError as error:
            raise RefusedRequest(str(error), field="language") from None

    def _check_draws(self, sampling: Sampling) -> None:
        """Raise RefusedRequest where a transcript is to be drawn and CTC writes it."""
        if sampling.draws_tokens and self._transcriber.decoding.decoder == "ctc":
            raise RefusedRequest(
                "temperature: expected 0: this server transcribes by CTC, which draws nothing",
                field="temperature",
            )

    def conversation(
        self,
        messages: Sequence[Message],
        recordings: Sequence[bytes],
        limit: int | None,
        sampling: Sampling = GREEDY,
    ) -> Piece:
        """Prepare a conversation whose last message is the user's. Raises RefusedRequest."""
        decoded = list(self._decoded(recordings))
        if not decoded and self._transcriber.template.kind == "plain":
            raise RefusedRequest(
                "messages: this model answers recordings; expected a part of type input_audio",
                field="messages",
            )
        # A recording without words around it is to be written down.
        bare = [message.parts for message in messages] == [(AUDIO,)]
        given: Sequence[Message] = [*messages, Message("assistant", ("",))]
        if bare:
            given = self._transcriber.request("", []).messages
        try:
            check_messages(list(given))
            _check_turns(given)
            self._transcriber.template.prompt(given)
        except (RefusedRow, ValueError) as error:
            raise RefusedRequest(f"messages: {error}", field="messages") from None
        if bare:
            self._check_draws(sampling)
        return Piece(given, decoded, bare, limit, sampling=sampling, draw=draw_number(""))

    def _decoded(self, recordings: Sequence[bytes]) -> Iterator[np.ndarray]:
        """Decode the recordings of a conversation, which are not cut into pieces."""
        most = min(self._longest, 2 * max(30.0, self._transcriber.longest_seconds))
        seconds = 0.0
        for number, data in enumerate(recordings):
            try:
                seconds += measure(data) / SAMPLING_RATE
                if seconds > most:
                    raise RefusedRequest(
                        f"the recordings last {seconds:.0f} s or more; expected at most "
                        f"{most:.0f} s in a conversation",
                        413,
                        "messages",
                    )
                yield decode(data)
            except AudioError as error:
                raise RefusedRequest(f"recording {number}: {error}", field="messages") from None

    def requests(self, pieces: Sequence[Piece]) -> list[Request]:
        """Encode the recordings of pieces in one batch, and ask for their answers."""
        transcriber = self._transcriber
        # Without autocast: features are those of the training.
        with torch.inference_mode():
            rest = transcriber.encode([audio for piece in pieces for audio in piece.recordings])
        requests = []
        for piece in pieces:
            count = len(piece.recordings)
            features, rest = rest[:count], rest[count:]
            made = transcriber.utterance(features, piece.messages)
            requests.append(
                replace(
                    request_of(made),
                    transcription=piece.transcription,
                    limit=piece.limit,
                    sampling=piece.sampling,
                    draw=piece.draw,
                )
            )
        return requests

    def width(self, piece: Piece) -> int:
        """Return the hypotheses that are searched for an answer: one where it is drawn."""
        return 1 if piece.sampling.draws_tokens else self._transcriber.decoding.beam

    def engine(self, width: int, places: int) -> Engine:
        """Make an engine with beams of `width` hypotheses, and `places` for hypotheses."""
        transcriber = self._transcriber
        return transcriber.engine(replace(transcriber.decoding, beam=width), places)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as the model was trained, without gradients."""
        with torch.inference_mode(), self._transcriber.autocast():
            yield

    def text(self, ids: Sequence[int]) -> str:
        """Decode tokens of an answer."""
        return text_of(self._transcriber.template, ids)

    def decoded(self, choice: Choice) -> Decoded:
        """Return a whole answer as text."""
        return as_text(self._transcriber.template, choice)


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise ValueError unless user and assistant take turns, after at most one system message."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[n % 2] for n in range(len(turns))]:
        raise ValueError("expected the user and the assistant to take turns, beginning with user")


def _consecutive(pieces: Iterable[np.ndarray]) -> Iterator[tuple[float, np.ndarray]]:
    """Yield pieces that follow each other with their starts in seconds."""
    seen = 0
    for audio in pieces:
        yield seen / SAMPLING_RATE, audio
        seen += len(audio)


def _slices(
    blocks: Iterable[np.ndarray], spans: Iterable[tuple[float, float]]
) -> Iterator[tuple[float, np.ndarray]]:
    """Take spans (start, duration in seconds), in order, out of blocks of one recording."""
    rest = iter(blocks)
    audio, position = np.zeros(0, dtype=np.float32), 0
    for start, duration in spans:
        first = round(start * SAMPLING_RATE)
        last = first + round(duration * SAMPLING_RATE)
        while position + len(audio) < last and (block := next(rest, None)) is not None:
            audio = np.concatenate((audio, block))
            # Silence before the span is not kept.
            dropped = min(max(0, first - position), len(audio))
            audio, position = audio[dropped:], position + dropped
        dropped = min(max(0, first - position), len(audio))
        audio, position = audio[dropped:], position + dropped
        yield start, audio[: last - position]
