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
    soft_NC: Tensor
    """Soft tokens of the frames of its recordings, one after another."""
    seconds: float
    """Audio in it."""


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
        _embed_prompt(model, prompt, recordings)
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
) -> EmbeddedPrompt:
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


def _generate_gpt(
    lm: GPT, embedded: list[Tensor], ids: list[Tensor], limits: list[int], end: int
) -> list[Answer]:
    """Continue rows greedily with a KV cache, until the last one ends.

    The host waits for the device once per token. Rows that have ended leave the batch when they are
    half of it.
    """
    device = embedded[0].device
    rows, longest = len(embedded), max(map(len, embedded))
    lengths = torch.tensor([len(row) for row in embedded], device=device)
    x = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    has_id = ids_BT != AUDIO
    # The cache has the dtype of the activations, which is autocast's where it is on.
    probe = lm.smear_gate(x[:1, :1, :SMEAR_GATE_CHANNELS])
    cache = KVCache(lm.config, rows, longest + max(limits), probe)
    layout = SegmentLayout.plain((rows, longest), device, lengths_B=lengths)
    hidden = layout.last(lm.trunk(x, ids_BT.clamp(min=0), layout, has_id, cache))
    answers: list[list[int]] = [[] for _ in range(rows)]
    in_batch = list(range(rows))
    open_rows, ended = set(in_batch), set[int]()
    while open_rows:
        chosen = lm.logits(hidden).argmax(-1)
        for row, token in zip(in_batch, chosen.tolist(), strict=True):
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
            if 2 * len(open_rows) <= len(in_batch):
                kept = [place for place, row in enumerate(in_batch) if row in open_rows]
                in_batch = [in_batch[place] for place in kept]
                places = torch.tensor(kept, device=device)
                chosen = chosen.index_select(0, places)
                cache.keep(places)
            step = chosen[:, None]
            layout = SegmentLayout.plain((len(in_batch), 1), device, cache.lengths_B)
            hidden = lm.trunk(lm.embed(step), step, layout, None, cache)[:, 0]
    return [Answer(ids, row not in ended) for row, ids in enumerate(answers)]
