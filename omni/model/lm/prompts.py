"""Prompts as a language model reads them: embeddings of text, and soft tokens of recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.audio.windows import FRAMES_PER_SECOND
from omni.model.chat_template import AUDIO
from omni.model.projector import stack_frames
from omni.model.speech_lm import OmniModel

_TOKENS_PER_SECOND = 12.0  # of audio
_LEAST, _MOST = 16, 200  # tokens


@dataclass(frozen=True)
class EmbeddedPrompt:
    """A prompt as the language model reads it."""

    x_TC: Tensor
    """Embeddings, with soft tokens."""
    ids_T: Tensor
    """Token ids; AUDIO for soft tokens."""
    soft_NC: Tensor
    """Soft tokens of the frames of its recordings, one after another."""
    seconds: float
    """Audio in it."""

    @property
    def usual_limit(self) -> int:
        """Most tokens of an answer, its end included, by models whose training says nothing of it:
        12 tokens per second of audio, between 16 and 200, and the end token."""
        return min(_MOST, max(_LEAST, int(self.seconds * _TOKENS_PER_SECOND))) + 1


def embed_prompt(
    model: OmniModel, prompt: Sequence[int], features: Sequence[Tensor]
) -> EmbeddedPrompt:
    """Embed a prompt: ids, with AUDIO for each of its recordings.

    features: (T, d) at 50 frames/s of each recording. Raises ValueError unless there is one for
    each AUDIO.
    """
    if (places := list(prompt).count(AUDIO)) != len(features):
        raise ValueError(f"{len(features)} recordings for a prompt with {places}")
    device = next(model.projector.parameters()).device
    recordings = iter(features)
    parts: list[Tensor] = []
    heard: list[Tensor] = []
    ids: list[Tensor] = []
    text: list[int] = []

    def flush() -> None:
        if text:
            given = torch.tensor(text, device=device)
            parts.append(model.lm.embed(given[None])[0])
            ids.append(given)
            text.clear()

    for token in prompt:
        if token != AUDIO:
            text.append(token)
            continue
        flush()
        stacked = stack_frames(next(recordings).to(device), model.config.stack)
        soft = model.project(stacked)
        starts = torch.arange(len(stacked), device=device) == 0
        summary = model.summarize(stacked, starts, 1)
        both = soft if summary is None else torch.cat((summary, soft))
        parts.append(both)
        heard.append(soft)
        ids.append(torch.full((len(both),), AUDIO, device=device))
    flush()
    like = model.lm.embed(torch.zeros(1, 1, dtype=torch.long, device=device))
    return EmbeddedPrompt(
        torch.cat([part.to(like.dtype) for part in parts]),
        torch.cat(ids),
        torch.cat(heard) if heard else like[0, :0],
        sum(map(len, features)) / FRAMES_PER_SECOND,
    )
