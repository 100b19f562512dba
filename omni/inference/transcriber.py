"""Load a checkpoint to transcribe recordings of any length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml
from torch import Tensor

from omni.audio.decode import AudioError, decode_blocks
from omni.checkpoint.checkpoint import CheckpointError, read_checkpoint
from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.tasks import TaskRule, task_rules
from omni.corpus.text import TextPolicy, join
from omni.errors import ConfigError, located
from omni.inference.decode_batch import Decoded, as_text, request_of
from omni.inference.pieces import cut_at_pauses
from omni.model.chat_template import Message, RefusedRow, Template, make_template, transcription
from omni.model.decode import AS_TRAINED, Decoding, DecodingError, DecodingOptions, Engine
from omni.model.download import SourceError
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.lm.generate import SLOTS
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniModel
from omni.storage.digest import digest
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import public_uri, reason_of
from omni.stream.codec import FeatureCodec
from omni.stream.collate import Utterance
from omni.stream.encoder_facts import EncoderFacts

ENCODE_BATCH = 16
"""Recordings, or pieces of one, that are encoded at a time."""


Sound: TypeAlias = "np.ndarray | Tensor"
"""A recording: (S,) fp32 mono at 16 kHz, or its features (T, d_model)."""


@dataclass(frozen=True)
class Request:
    """A transcript to be written.

    name: of the row or file. messages: the last one is the answer, whose text does not matter.
    pieces: the recordings of the messages, once for each piece of a long recording. Reading them
    may raise ValueError.
    """

    name: str
    messages: Sequence[Message]
    pieces: Iterable[Sequence[Sound]]
    transcription: bool = True
    """True where the answer is what is said in the only recording."""
    draw: str = ""
    """Name that draws depend on, beside the seed and the number of the piece."""


def draw_number(name: str, piece: int = 0) -> int:
    """Number the draws of a piece of a request: the same whatever is decoded beside it."""
    return int(digest(f"{name} {piece}", size=8), 16)


@dataclass(frozen=True)
class Transcript(Decoded):
    """The text of a recording. cut: that of a piece of it was. pieces: what it was cut into."""

    pieces: int = 1

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of a JSON line: the text, its decoder, and "cut" where it is incomplete."""
        cut = {"cut": True} if self.cut else {}
        return {"text": self.text, **cut, "decoder": self.decoder}


@dataclass
class _Open:
    """A request of which pieces are yet to be decoded."""

    pieces: int = 0
    whole: bool = False  # All pieces have been read.
    decoded: dict[int, Decoded] = field(default_factory=dict)
    """By the number of the piece."""
    error: ValueError | None = None

    def read(self, pieces: Iterator[Sequence[Sound]]) -> Sequence[Sound] | None:
        """Read a piece; None after the last one, or an error."""
        try:
            spoken = next(pieces, None)
        except ValueError as error:
            self.error, spoken = error, None
        self.pieces += spoken is not None
        self.whole = spoken is None
        return spoken

    @property
    def done(self) -> bool:
        return self.whole and len(self.decoded) == self.pieces

    def result(self) -> Transcript | ValueError:
        if self.error is not None:
            return self.error
        answers = [self.decoded[number] for number in range(self.pieces)]
        first = answers[0] if answers else Decoded("", False)
        known = [answer.log_prob for answer in answers if answer.log_prob is not None]
        return Transcript(
            _join(answer.text for answer in answers),
            any(answer.cut for answer in answers),
            first.decoder,
            {d: _join(answer.alone[d] for answer in answers) for d in first.alone},
            sum(known) if known and len(known) == len(answers) else None,
            sum(answer.tokens for answer in answers),
            self.pieces,
        )


@dataclass(frozen=True)
class _Piece:
    """A piece of a request, to be encoded and decoded."""

    of: _Open
    number: int
    request: Request
    spoken: Sequence[Sound]


def _join(texts: Iterable[str]) -> str:
    """Join the texts of the pieces of a recording."""
    return join([text for text in texts if text])


@dataclass(frozen=True)
class Transcriber:
    """Transcribe audio with the encoder and model of a checkpoint, as they were in training."""

    encoder: WhisperEncoder
    codec: FeatureCodec
    model: OmniModel
    template: Template
    prompt: str
    bf16: bool
    longest_seconds: float
    """Seconds that nearly all training utterances stay under."""
    policy: TextPolicy = TextPolicy()
    cache_folder: str = ""
    """Name of the folder in a feature cache that holds the features of the encoder."""
    decoding: Decoding = Decoding()
    """Its max_new_tokens is None for checkpoints of older versions, see `Decoding`."""
    tasks: Mapping[str, TaskRule] = field(default_factory=dict)
    """Tasks of the training by name."""
    keep: Sequence[str] = ()
    """Columns of manifests that are labels, for its tasks."""

    @classmethod
    def load(
        cls,
        checkpoint: StoragePath,
        device: str = "cpu",
        options: DecodingOptions = AS_TRAINED,
    ) -> Transcriber:
        """Load the encoder, model and tokenizer of a checkpoint.

        options: settings that checkpoints of older versions do not know have their defaults. Raises
        ConfigError when the checkpoint or its encoder cannot be used, or for a decoder that needs a
        CTC head where there is none, and for settings that do not fit together.
        """
        try:
            found = read_checkpoint(checkpoint, verify=True)
            facts = EncoderFacts.from_dict(found.encoder)
            encoder = WhisperEncoder(**facts.arguments, device=device)
            if encoder.fingerprint != facts.fingerprint:
                raise CheckpointError(
                    f"{checkpoint}: trained on the features of encoder weights that differ "
                    f"from those that {facts.source!r} holds now"
                )
            config = yaml.safe_load((found.path / "config.yaml").read_text())
            wanted = torch.bfloat16 if config["train"]["precision"] == "bf16" else torch.float32
            bf16 = compute_dtype(wanted, torch.device(device)) == torch.bfloat16
            model = found.load_model(torch.bfloat16 if bf16 else None).to(device).eval()
            template = make_template(found.tokenizer(), config["data"].get("template", "auto"))
        except (CheckpointError, SourceError, ValueError) as error:
            raise ConfigError(f"--checkpoint: {error}") from None
        try:
            decoding = Decoding.of_config(config, options, head=model.ctc_head is not None)
        except DecodingError as error:
            raise ConfigError(f"--{error.setting}: {error} (checkpoint {checkpoint})") from None
        return cls(
            encoder,
            facts.codec,
            model,
            template,
            config["data"]["prompt"],
            bf16,
            facts.longest_seconds,
            TextPolicy.of(config["data"]),
            facts.cache_folder,
            decoding,
            task_rules(config["data"]),
            config["data"].get("keep", ()),
        )

    def features_of(self, audio: np.ndarray) -> Tensor:
        """Encode (S,) fp32 mono at 16 kHz to features (T, d_model), rounded as in training."""
        return self.codec.roundtrip(self.encoder.encode([audio])[0])

    def utterance(
        self,
        spoken: Sequence[Sound],
        messages: Sequence[Message],
        number: int = 0,
        transcription: bool = True,
    ) -> Utterance:
        """Build the model's input: the conversation before its last answer, and its recordings."""
        features = [self._features(sound) for sound in spoken]
        prompt = self.template.prompt(messages)
        given = [False] * len(prompt)
        return Utterance(features, prompt, given, number, transcription=transcription)

    def _features(self, sound: Sound) -> Tensor:
        return sound if isinstance(sound, Tensor) else self.features_of(sound)

    def encode(self, spoken: Sequence[Sound]) -> list[Tensor]:
        """Encode recordings as `features_of` does, all that have no features in one batch."""
        audio = [sound for sound in spoken if not isinstance(sound, Tensor)]
        encoded = iter(self.encoder.encode(audio) if audio else [])
        return [
            sound if isinstance(sound, Tensor) else self.codec.roundtrip(next(encoded))
            for sound in spoken
        ]

    def engine(self, decoding: Decoding | None = None, slots: int = SLOTS) -> Engine:
        """Make an engine that decodes by the model. decoding: None for the transcriber's own."""
        settings = decoding or self.decoding
        return Engine(self.model, end=self.template.end, settings=settings, slots=slots)

    def answers(self, requests: Iterable[Request]) -> Iterator[Transcript | ValueError]:
        """Answer requests in order, or return the error of a recording that cannot be read.

        Pieces are decoded side by side, of whichever requests they are. Raises ConfigError naming a
        request whose messages the chat template refuses.
        """
        run = _Answering(self)
        for request in requests:
            opened, pieces = run.open(), iter(request.pieces)
            while (spoken := opened.read(pieces)) is not None:
                run.add(_Piece(opened, opened.pieces - 1, request, spoken))
            yield from run.complete()
        run.finish()
        yield from run.complete()

    def autocast(self) -> torch.autocast:
        """Compute in the precision of the training."""
        return torch.autocast(self.encoder.device.type, torch.bfloat16, enabled=self.bf16)

    def request(
        self, name: str, pieces: Iterable[np.ndarray], language: str | None = None, draw: str = ""
    ) -> Request:
        """Ask for the transcript of a recording in the words of the training prompt.

        language: language code for the prompt of a model trained with data.language_tag. draw: see
        `Request`.
        """
        default = self.policy.prompts.get(DEFAULT_TASK, "")
        prompt = self.policy.prompt(self.prompt or default, language or self.policy.language)
        return Request(name, transcription(prompt, ""), ([piece] for piece in pieces), draw=draw)

    def text_of(self, blocks: Iterable[np.ndarray], language: str | None = None) -> Transcript:
        """Transcribe a recording of any length from blocks of (S,) fp32 mono at 16 kHz.

        language: as in `request`. Raises AudioError where the blocks do.
        """
        pieces = cut_at_pauses(blocks, self.longest_piece)
        [found] = self.answers([self.request("", pieces, language)])
        if isinstance(found, ValueError):
            raise found
        return found

    @property
    def longest_piece(self) -> float:
        """Return the length in seconds of the longest piece to transcribe at a time."""
        return longest_piece(self.longest_seconds)

    def check_language(self, language: str | None) -> None:
        """Raise ConfigError if `language` is not a language code, or if the model was trained
        without language tags."""
        if language is None:
            return
        if not self.policy.language_tag:
            raise ConfigError("--language: expected a checkpoint trained with data.language_tag")
        try:
            self.policy.prompt("", language)
        except ValueError as error:
            raise ConfigError(f"--language: {error}") from None


class _Answering:
    """Pieces on their way through encoder and engine."""

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber, self._engine = transcriber, transcriber.engine()
        self._open: deque[_Open] = deque()
        self._unencoded: list[_Piece] = []
        self._decoding: dict[int, _Piece] = {}
        self._count = 0

    def open(self) -> _Open:
        opened = _Open()
        self._open.append(opened)
        return opened

    def add(self, piece: _Piece) -> None:
        """Add a piece; few are in memory at a time."""
        self._unencoded.append(piece)
        if len(self._unencoded) == ENCODE_BATCH:
            self._encode()
        while not self._engine.room:
            self._step()

    def finish(self) -> None:
        """Decode what is left."""
        self._encode()
        while self._engine.busy:
            self._step()

    def complete(self) -> Iterator[Transcript | ValueError]:
        """Yield what is complete, in order."""
        while self._open and self._open[0].done:
            yield self._open.popleft().result()

    def _encode(self) -> None:
        pieces, self._unencoded = self._unencoded, []
        transcriber = self._transcriber
        for piece, features in zip(pieces, self._features(pieces), strict=True):
            request = piece.request
            try:
                made = transcriber.utterance(features, request.messages, 0, request.transcription)
            except RefusedRow as error:
                raise ConfigError(f"{request.name}: {error}") from None
            self._decoding[self._count] = piece
            draw = draw_number(request.draw, piece.number)
            with transcriber.autocast():
                self._engine.add(self._count, replace(request_of(made), draw=draw))
            self._count += 1

    def _features(self, pieces: Sequence[_Piece]) -> list[list[Tensor]]:
        """Encode the recordings of pieces; the error of one names its request."""
        try:
            every = iter(self._transcriber.encode([s for piece in pieces for s in piece.spoken]))
            return [[next(every) for _ in piece.spoken] for piece in pieces]
        except Exception as error:
            if len(pieces) == 1:
                raise located(error, pieces[0].request.name) from error
            return [self._features([piece])[0] for piece in pieces]

    def _step(self) -> None:
        with self._transcriber.autocast():
            done = self._engine.step()
        for key, choice in done:
            piece = self._decoding.pop(key)
            piece.of.decoded[piece.number] = as_text(self._transcriber.template, choice)


def longest_piece(longest_seconds: float) -> float:
    """Return the longest piece in seconds for a model that has learnt such utterances."""
    return max(longest_seconds, 2.0)


def transcribe_files(
    transcriber: Transcriber, files: Sequence[str], language: str | None = None
) -> Iterator[dict[str, Any]]:
    """Transcribe files: yield {"audio", "text"}, or {"audio", "error"} for an unreadable file.

    A text that is incomplete has "cut". Raises ConfigError as `Transcriber.check_language`.
    """
    transcriber.check_language(language)
    for file in files:
        path, file = as_path(file), public_uri(file)
        try:
            if isinstance(path, Path) and not path.is_file():
                raise AudioError("missing", f"no such file: {file}")
            found = transcriber.text_of(decode_blocks(path), language)
        except OSError as error:
            raise RuntimeError(f"{file}: {reason_of(error)}") from error
        except AudioError as error:
            yield {"audio": file, "error": str(error)}
            continue
        yield {"audio": file, **found.fields}
