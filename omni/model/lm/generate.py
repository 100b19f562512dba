"""Greedy decoding of a batch of prompts with audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.audio.windows import FRAMES_PER_SECOND
from omni.model.chat_template import AUDIO
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import SMEAR_GATE_CHANNELS, KVCache
from omni.model.packed_attention import SegmentLayout
from omni.model.projector import stack_frames
from omni.model.speech_lm import OmniModel

_TOKENS_PER_SECOND = 12.0  # of audio
_LEAST, _MOST = 16, 200  # tokens


@dataclass(frozen=True)
class Answer:
    """Token ids that were generated, without the end token. cut: the limit came before the end."""

    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class EmbeddedPrompt:
    """A prompt as the language model reads it."""

    x_TC: Tensor
    """Embeddings, with soft tokens."""
    ids_T: Tensor
    """Token ids; AUDIO for soft tokens."""
    seconds: float
    """Audio in it."""

    @property
    def soft_NC(self) -> Tensor:
        """Return the soft tokens of its recordings, one after another."""
        return self.x_TC[self.ids_T == AUDIO]


@torch.inference_mode()
def generate(
    model: OmniModel,
    prompts: Sequence[Sequence[int]],
    features: Sequence[Sequence[Tensor]],
    *,
    end: int,
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Generate the answer to each prompt greedily.

    prompts: ids, with AUDIO for each recording. features: for each prompt, one (T, d) tensor at
    50 frames/s per recording. max_new_tokens: most tokens of an answer, its end token included, so
    that a model that loops is stopped. None, for models of older versions, whose training said
    nothing about it: 12 tokens per second of audio, between 16 and 200, and the end token.
    """
    embedded = embed_prompts(model, prompts, features)
    return continue_prompts(model, embedded, end, max_new_tokens)


def embed_prompts(
    model: OmniModel, prompts: Sequence[Sequence[int]], features: Sequence[Sequence[Tensor]]
) -> list[EmbeddedPrompt]:
    """Embed prompts; see `generate`."""
    return [
        EmbeddedPrompt(
            *_embed_prompt(model, prompt, recordings), sum(map(len, recordings)) / FRAMES_PER_SECOND
        )
        for prompt, recordings in zip(prompts, features, strict=True)
    ]


def answer_limit(prompt: EmbeddedPrompt, max_new_tokens: int | None) -> int:
    """Return the most tokens of an answer, its end token included; see `generate`."""
    if max_new_tokens is not None:
        return max_new_tokens
    return min(_MOST, max(_LEAST, int(prompt.seconds * _TOKENS_PER_SECOND))) + 1


def continue_prompts(
    model: OmniModel, prompts: Sequence[EmbeddedPrompt], end: int, max_new_tokens: int | None
) -> list[Answer]:
    """Generate the answers to embedded prompts; see `generate`."""
    if not prompts:
        return []
    rows, ids = [prompt.x_TC for prompt in prompts], [prompt.ids_T for prompt in prompts]
    limits = [answer_limit(prompt, max_new_tokens) for prompt in prompts]
    if isinstance(model.lm, GPT):
        answers = _generate_gpt(model.lm, rows, ids, limits, end)
    else:
        answers = [Answer(*found) for found in model.lm.generate(rows, limits, end)]
    if max_new_tokens is not None:
        return answers
    # The token after the limit of older versions only tells whether the answer ended there.
    return [Answer(a.ids[: limit - 1], a.cut) for a, limit in zip(answers, limits, strict=True)]


def _embed_prompt(
    model: OmniModel, prompt: Sequence[int], features: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Embed a prompt: (T, C) embeddings with soft tokens, and (T,) ids, AUDIO for those."""
    device = next(model.projector.parameters()).device
    recordings = iter(features)
    parts: list[Tensor] = []
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
        soft = model.project(stack_frames(next(recordings).to(device), model.config.stack))
        parts.append(soft)
        ids.append(torch.full((len(soft),), AUDIO, device=device))
    flush()
    like = model.lm.embed(torch.zeros(1, 1, dtype=torch.long, device=device))
    return torch.cat([part.to(like.dtype) for part in parts]), torch.cat(ids)


def _generate_gpt(
    lm: GPT, embedded: list[Tensor], ids: list[Tensor], limits: list[int], end: int
) -> list[Answer]:
    """Continue rows greedily with a KV cache, until the last one ends."""
    device = embedded[0].device
    lengths = torch.tensor([len(row) for row in embedded], device=device)
    rows, longest = len(embedded), int(lengths.max())
    x = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    has_id = ids_BT != AUDIO
    # The cache has the dtype of the activations, which is autocast's where it is on.
    probe = lm.smear_gate(x[:1, :1, :SMEAR_GATE_CHANNELS])
    cache = KVCache(lm.config, rows, longest + max(limits), probe)
    layout = SegmentLayout.plain((rows, longest), device, lengths_B=lengths)
    hidden = layout.last(lm.trunk(x, ids_BT.clamp(min=0), layout, has_id, cache))
    answers: list[list[int]] = [[] for _ in range(rows)]
    open_rows, ended = set(range(rows)), set[int]()
    while open_rows:
        chosen = lm.logits(hidden).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row not in open_rows:
                continue
            if token == end:
                open_rows.discard(row)
                ended.add(row)
                continue
            answers[row].append(token)
            if len(answers[row]) >= limits[row]:
                open_rows.discard(row)
        if open_rows:
            step = chosen[:, None]
            layout = SegmentLayout.plain((rows, 1), device, cache.lengths_B)
            hidden = lm.trunk(lm.embed(step), step, layout, None, cache)[:, 0]
    return [Answer(ids, row not in ended) for row, ids in enumerate(answers)]
