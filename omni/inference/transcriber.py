"""Load a checkpoint to score a manifest or to transcribe recordings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from omni.audio.decode import AudioError, AudioSpan, decode, decode_blocks, decode_with_retry, fit
from omni.audio.logmel import SAMPLING_RATE
from omni.checkpoint.checkpoint import CheckpointError, read_checkpoint
from omni.corpus.index import build_index
from omni.corpus.index_row import DEFAULT_TASK, IndexRow, recordings
from omni.corpus.lengths import Reject, span_of
from omni.corpus.messages import messages_of
from omni.corpus.text import TextPolicy, apply_policy, join
from omni.errors import ConfigError, located
from omni.inference.decode_batch import HeldUtterance, by_language, summarize, transcribe
from omni.metrics.text_metric import TextMetric, score
from omni.model.chat_template import Message, Template, make_template, transcription
from omni.model.download import SourceError
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.precision import compute_dtype
from omni.model.speech_lm import OmniModel
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import public_uri, reason_of
from omni.stream.codec import DTYPES, FeatureCodec
from omni.stream.collate import Utterance
from omni.stream.encoder_facts import EncoderFacts

# At most this many recordings, or pieces of one, are in memory at a time.
ENCODE_BATCH = 64


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

    @classmethod
    def load(cls, checkpoint: StoragePath, device: str = "cpu") -> Transcriber:
        """Load the encoder, model and tokenizer of a checkpoint.

        Raises ConfigError when the checkpoint or its encoder cannot be used.
        """
        try:
            found = read_checkpoint(checkpoint, verify=True)
            facts = EncoderFacts.from_dict(found.encoder)
            encoder = WhisperEncoder(
                facts.source,
                mode=facts.mode,
                margin_seconds=facts.margin_seconds,
                layers=facts.layers or "last",
                dtype=DTYPES[facts.dtype],
                device=device,
            )
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
        return cls(
            encoder,
            facts.codec,
            model,
            template,
            config["data"]["prompt"],
            bf16,
            facts.longest_seconds,
            TextPolicy.of(config["data"]),
        )

    def features_of(self, audio: np.ndarray) -> Tensor:
        """Encode (S,) fp32 mono at 16 kHz to features (T, d_model), rounded as in training."""
        return self.codec.roundtrip(self.encoder.encode([audio])[0])

    def utterance(
        self, spoken: Sequence[np.ndarray], messages: Sequence[Message], number: int
    ) -> Utterance:
        """Build the model's input from a conversation and its recordings."""
        features = [self.features_of(audio) for audio in spoken]
        rendered = self.template.render([messages])[0]
        return Utterance(features, rendered.ids, rendered.supervised, number)

    def write(self, held: Sequence[HeldUtterance]) -> list[dict[str, Any]]:
        """Decode utterances to transcript rows; those without features are left out."""
        device = self.encoder.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return transcribe(self.model, self.template, held)

    def text_of(self, blocks: Iterable[np.ndarray], language: str | None = None) -> str:
        """Transcribe a recording of any length from blocks of (S,) fp32 mono at 16 kHz.

        language: language code for the prompt of a model trained with data.language_tag.
        The audio is cut where it is quiet, into pieces of at most `longest_piece` seconds, of which
        ENCODE_BATCH are in memory at a time.
        """
        pieces = cut_at_quiet(blocks, self.longest_piece)
        return join([text for text in self.texts_of(pieces, language) if text])

    @property
    def longest_piece(self) -> float:
        """Return the length in seconds of the longest piece to transcribe at a time."""
        return max(self.longest_seconds, 2.0)

    def texts_of(self, pieces: Iterable[np.ndarray], language: str | None = None) -> Iterator[str]:
        """Transcribe pieces of (S,) fp32 mono at 16 kHz, ENCODE_BATCH of them at a time."""
        default = self.policy.prompts.get(DEFAULT_TASK, "")
        prompt = self.policy.prompt(self.prompt or default, language or self.policy.language)
        pieces = iter(pieces)
        while group := list(itertools.islice(pieces, ENCODE_BATCH)):
            held = [
                HeldUtterance(self.utterance([piece], transcription(prompt, ""), i), "", "", "")
                for i, piece in enumerate(group)
            ]
            rows = sorted(self.write(held), key=lambda row: row["number"])
            yield from (row["hypothesis"] for row in rows)

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


def cut_at_quiet(blocks: Iterable[np.ndarray], longest_seconds: float) -> Iterator[np.ndarray]:
    """Cut audio where a 100 ms window is quietest, so that no piece exceeds `longest_seconds`."""
    longest = round(longest_seconds * SAMPLING_RATE)
    window = SAMPLING_RATE // 10
    audio = np.zeros(0, dtype=np.float32)
    for block in blocks:
        audio = np.concatenate((audio, block))
        while len(audio) > longest:
            # Only the second half is searched, so that a cut piece is at least half the limit.
            candidates = audio[longest // 2 : longest]
            frames = candidates[: len(candidates) // window * window].reshape(-1, window)
            quietest = int(np.square(frames).mean(axis=1).argmin())
            cut = longest // 2 + quietest * window + window // 2
            yield audio[:cut]
            audio = audio[cut:]
    if len(audio):
        yield audio


def evaluate(
    transcriber: Transcriber,
    manifest: str,
    *,
    allow_absolute: bool = False,
    metrics: Sequence[TextMetric] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score a manifest, and return the summary and one transcript row per utterance.

    Recordings that cannot be read are counted as rejects and left out of the error rates. Raises
    ConfigError when the manifest cannot be used, RuntimeError when storage does not answer.
    """
    try:
        index = build_index([manifest], prompt=transcriber.prompt, allow_absolute=allow_absolute)
        index = apply_policy(index, transcriber.policy)
    except ValueError as error:
        raise ConfigError(f"--data: {error}") from None
    except OSError as error:
        # Storage may answer later, so the config is not to blame.
        raise RuntimeError(f"--data: {reason_of(error)}") from error
    rows: list[dict[str, Any]] = []
    rejects = list(index.rejects)
    for batch in index.table.to_batches(max_chunksize=ENCODE_BATCH):
        held, bad = hold(transcriber, batch.to_pylist(), len(rows))
        rejects += bad
        rows += sorted(transcriber.write(held), key=lambda row: row["number"])
    errors = summarize(rows)
    counts: dict[str, int] = {}
    for reject in rejects:
        counts[reject.reason] = counts.get(reject.reason, 0) + 1
    summary = {
        "manifest": public_uri(manifest),
        "utterances": len(rows),
        "wer": errors["all"].wer,
        "wer_short": errors["short"].wer,
        "wer_long": errors["long"].wer,
        "cer": errors["all"].cer,
        "words": errors["all"].words,
        "word_errors": errors["all"].word_errors,
        **({"languages": languages} if (languages := by_language(rows)) else {}),
        **({"metrics": score(rows, metrics)} if metrics else {}),
        "rejects": counts,
    }
    return summary, [{k: v for k, v in r.items() if k not in ("errors", "number")} for r in rows]


def hold(
    transcriber: Transcriber, rows: list[IndexRow], first: int
) -> tuple[list[HeldUtterance], list[Reject]]:
    """Encode rows of an index, numbered from `first` on; return utterances and unreadable rows.

    Raises RuntimeError when object storage stays unavailable.
    """
    held, bad = [], []
    prompts = transcriber.policy.prompts
    for number, row in enumerate(rows, start=first):
        row["prompt"] = row["prompt"] or prompts.get(row["task"] or DEFAULT_TASK, "")
        try:
            spoken = [
                fit(_decode_recording(r["uri"], span_of(r), r["samples"]), r["samples"])
                for r in recordings(row)
            ]
        except AudioError as error:
            bad.append(Reject(row["id"], row["uri"], error.reason, error.detail))
            continue
        try:
            utterance = transcriber.utterance(spoken, messages_of(row), number)
        except Exception as error:
            raise located(error, f"{row['id']} ({row['uri']})") from error
        held.append(
            HeldUtterance(
                utterance,
                row["id"],
                row["uri"],
                row["text"],
                row["language"] or "en",
                span_of(row),
            )
        )
    return held, bad


def _decode_recording(uri: str, span: AudioSpan, samples: int) -> np.ndarray:
    """Decode a recording; wait for object storage that is unavailable."""
    read = decode_with_retry if "://" in uri else decode
    try:
        return read(uri, span, samples=samples)
    except OSError as error:
        raise RuntimeError(f"{uri}: {reason_of(error)}") from error


def transcribe_files(
    transcriber: Transcriber, files: Sequence[str], language: str | None = None
) -> Iterator[dict[str, str]]:
    """Transcribe files: yield {"audio", "text"}, or {"audio", "error"} for an unreadable file.

    Raises ConfigError as `Transcriber.check_language`.
    """
    transcriber.check_language(language)
    for file in files:
        path, file = as_path(file), public_uri(file)
        try:
            if isinstance(path, Path) and not path.is_file():
                raise AudioError("missing", f"no such file: {file}")
            text = transcriber.text_of(decode_blocks(path), language)
        except OSError as error:
            raise RuntimeError(f"{file}: {reason_of(error)}") from error
        except AudioError as error:
            yield {"audio": file, "error": str(error)}
            continue
        yield {"audio": file, "text": text}
