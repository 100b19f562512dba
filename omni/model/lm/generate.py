"""Greedy decoding of many utterances at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni.audio.logmel import FRAMES_PER_SECOND
from omni.model.chat_template import AUDIO
from omni.model.lm.gpt import GPT, SMEAR_GATE_CHANNELS, KVCache
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
    """Token ids that the model writes after each prompt, without the end token.

    prompts: ids with AUDIO where a recording stands. features: for each prompt, a (T, d) tensor at
    50 frames/s for each of its recordings.
    An answer ends with the end token, or after `tokens_per_second` of its audio (at least 16,
    at most `max_tokens`): nobody speaks faster, and a model that loops is stopped.
    """
    if not prompts:
        return []
    rows, ids = [], []
    for prompt, spoken in zip(prompts, features, strict=True):
        row, row_ids = _embedded(model, prompt, spoken)
        rows.append(row)
        ids.append(row_ids)
    seconds = [sum(map(len, spoken)) / FRAMES_PER_SECOND for spoken in features]
    limits = [min(max_tokens, max(16, int(s * tokens_per_second))) for s in seconds]
    if isinstance(model.lm, GPT):
        return _write(model.lm, rows, ids, limits, end)
    return model.lm.write(rows, limits, end)


def _embedded(
    model: OmniModel, prompt: Sequence[int], spoken: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Embeddings (T, C) of a prompt with its soft tokens, and its ids, AUDIO for each of those."""
    device = next(model.projector.parameters()).device
    recordings = iter(spoken)
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


def _write(
    lm: GPT, embedded: list[Tensor], ids: list[Tensor], limits: list[int], end: int
) -> list[list[int]]:
    """Greedy continuations with a KV cache; rows that end early wait for the others."""
    device = embedded[0].device
    lengths = torch.tensor([len(row) for row in embedded], device=device)
    rows, longest = len(embedded), int(lengths.max())
    x = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    has_id = ids_BT != AUDIO
    # Values have the dtype of the activations: autocast's where it is on.
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
