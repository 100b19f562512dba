"""Greedy decoding of a batch of prompts with audio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni.audio.logmel import FRAMES_PER_SECOND
from omni.model.chat_template import AUDIO
from omni.model.lm.gpt import GPT
from omni.model.lm.gpt_block import SMEAR_GATE_CHANNELS, KVCache
from omni.model.packed_attention import SegmentLayout
from omni.model.projector import stack_frames
from omni.model.speech_lm import OmniModel


@torch.inference_mode()
def generate(
    model: OmniModel,
    prompts: Sequence[Sequence[int]],
    features: Sequence[Sequence[Tensor]],
    *,
    end: int,
    max_tokens: int = 200,
    tokens_per_second: float = 12.0,
) -> list[list[int]]:
    """Generate the answer to each prompt greedily; returns token ids without the end token.

    prompts: ids, with AUDIO for each recording. features: for each prompt, one (T, d) tensor at
    50 frames/s per recording.
    An answer has at most `tokens_per_second` tokens per second of its audio (at least 16, at most
    `max_tokens`): more than anybody speaks, so that a model that loops is stopped.
    """
    if not prompts:
        return []
    rows, ids = [], []
    for prompt, recordings in zip(prompts, features, strict=True):
        row, row_ids = _embed_prompt(model, prompt, recordings)
        rows.append(row)
        ids.append(row_ids)
    seconds = [sum(map(len, recordings)) / FRAMES_PER_SECOND for recordings in features]
    limits = [min(max_tokens, max(16, int(s * tokens_per_second))) for s in seconds]
    if isinstance(model.lm, GPT):
        return _generate_gpt(model.lm, rows, ids, limits, end)
    return model.lm.generate(rows, limits, end)


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
) -> list[list[int]]:
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
    open_rows = set(range(rows))
    while open_rows:
        chosen = lm.logits(hidden).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row not in open_rows:
                continue
            if token == end:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if len(answers[row]) >= limits[row]:
                open_rows.discard(row)
        if open_rows:
            step = chosen[:, None]
            layout = SegmentLayout.plain((rows, 1), device, cache.lengths_B)
            hidden = lm.trunk(lm.embed(step), step, layout, None, cache)[:, 0]
    return answers
