"""From recordings to the inputs of an exported model of omni, and from its answers to text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from omni.audio.logmel import log_mel
from omni.audio.windows import FRAME, HOP, SAMPLING_RATE, plan_windows
from omni.corpus.text import TextPolicy, join
from omni.inference.pieces import cut_at_pauses
from omni.model.chat_template import Message, Template, transcription
from omni.model.tokenizer import Rendering, SpeechTokenizer


@dataclass(frozen=True)
class OmniTranscript:
    """Text of a recording. cut: it is incomplete, since a limit of tokens came before its end."""

    text: str
    cut: bool = False


class OmniSpeechProcessor(ProcessorMixin):
    """Log-mels of windows, as omni cuts them, and the prompt that the model was trained with.

    settings: mode, margin_seconds and longest_piece of audio; prompt, template, tokens and text of
    the prompt.
    """

    attributes = ["feature_extractor", "tokenizer"]

    def __init__(
        self, feature_extractor: Any = None, tokenizer: Any = None, settings: Any = None
    ) -> None:
        super().__init__(feature_extractor, tokenizer)  # type: ignore[no-untyped-call]
        self.settings = dict(settings)
        self.policy = TextPolicy(**self.settings["text"])

    @functools.cached_property
    def speech_tokenizer(self) -> SpeechTokenizer:
        """The tokenizer as omni uses it."""
        inner = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokens = self.settings["tokens"]
        if tokens is None:
            return SpeechTokenizer(inner)
        rendering = self.settings["rendering"]
        return SpeechTokenizer(
            inner,
            bos_token=tokens["bos_token"],
            end_token=tokens["end_token"],
            chat_template=self.tokenizer.chat_template,
            rendering=None if rendering is None else Rendering(**rendering),
        )

    @functools.cached_property
    def template(self) -> Template:
        return Template(self.speech_tokenizer, self.settings["template"])

    def prompt_ids(self, prompt: str | None = None, language: str | None = None) -> list[int]:
        """Return the token ids before an answer, with -1 for the recording.

        prompt: None takes that of the training; <|audio|> in it is the place of the recording.
        language: code of the language, for a model that was trained with language tags.
        """
        if language is not None and not self.policy.language_tag:
            raise ValueError("language: the model was not trained with language tags")
        words = self.settings["prompt"] if prompt is None else prompt
        words = self.policy.prompt(words, language or self.policy.language)
        messages: tuple[Message, ...] = transcription(words, "")
        return self.template.prompt(messages)

    def __call__(
        self,
        audio: np.ndarray | Sequence[np.ndarray],
        sampling_rate: int,
        *,
        prompt: str | None = None,
        language: str | None = None,
    ) -> BatchFeature:
        """Make the inputs of `OmniSpeechModel` of R recordings, (S,) mono at 16 kHz each.

        A recording that is longer than those of the training is cut at pauses into pieces, for
        which the package silero-vad is needed. A piece is encoded in windows of at most 30 s.
        Returns, for P pieces and W windows in all:

        input_features  (W, n_mels, T) log-mels, padded with zeros
        mel_lengths     (W,) mel frames before the padding
        frame_lengths   (W,) encoder frames that are kept
        window_counts   (P,) windows of each piece
        piece_counts    (R,) pieces of each recording
        input_ids       (P, L) prompt of each piece, -1 for the recording
        """
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"sampling_rate: expected {SAMPLING_RATE}, got {sampling_rate}")
        recordings = [audio] if isinstance(audio, np.ndarray) and audio.ndim == 1 else list(audio)
        bins = int(self.feature_extractor.feature_size)
        mode, margin = self.settings["mode"], self.settings["margin_seconds"]
        mels: list[Tensor] = []
        frames: list[int] = []
        windows: list[int] = []
        pieces: list[int] = []
        for number, recording in enumerate(recordings):
            wave = _checked(recording, number)
            found = list(cut_at_pauses([wave], self.settings["longest_piece"]))
            pieces.append(len(found))
            for piece in found:
                planned = plan_windows(len(piece), mode, margin)
                windows.append(len(planned))
                frames += [window.frames for window in planned]
                mels += [log_mel(piece[w.start : w.stop], bins, w.padded) for w in planned]
        longest = max((w.shape[1] for w in mels), default=FRAME // HOP)
        features = torch.zeros(len(mels), bins, longest)
        for row, mel in zip(features, mels, strict=True):
            row[:, : mel.shape[1]] = mel
        prompted = self.prompt_ids(prompt, language)
        return BatchFeature(
            {
                "input_features": features,
                "mel_lengths": _integers(mel.shape[1] for mel in mels),
                "frame_lengths": _integers(frames),
                "window_counts": _integers(windows),
                "piece_counts": _integers(pieces),
                "input_ids": _integers(prompted).repeat(len(windows), 1),
            }
        )

    def transcripts(self, output: Any, inputs: Any) -> list[OmniTranscript]:
        """Decode the output of `OmniSpeechModel.generate`, and join the pieces of recordings."""
        texts = [
            self.speech_tokenizer.decode(ids[:length]).strip()
            for ids, length in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)
        ]
        cut, found, at = output.cut.tolist(), [], 0
        for count in inputs["piece_counts"].tolist():
            pieces = slice(at, at + count)
            said = join([text for text in texts[pieces] if text])
            found.append(OmniTranscript(said, any(cut[pieces])))
            at += count
        return found


def _checked(recording: Any, number: int) -> np.ndarray:
    """Return a recording in fp32. Raises ValueError naming its number."""
    wave = np.asarray(recording)
    if wave.ndim != 1 or wave.dtype.kind != "f":
        raise ValueError(
            f"recording {number}: expected (S,) mono floating-point samples, got "
            f"{wave.shape} {wave.dtype}"
        )
    if not np.isfinite(wave).all():
        raise ValueError(f"recording {number}: expected finite samples")
    return wave.astype(np.float32)


def _integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
