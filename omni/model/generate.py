"""Greedy decoding of many utterances at once, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni.model.gpt import SMEAR_GATE_CHANNELS, KVCache
from omni.model.omni import OmniModel
from omni.model.packing import SegmentLayout
from omni.model.projector import stack_frames


@torch.inference_mode()
def generate(
    model: OmniModel,
    features: Sequence[Tensor],
    *,
    bos: int,
    end: int,
    prompt_ids: Sequence[int] = (),
    max_tokens: int = 200,
    tokens_per_second: float = 12.0,
) -> list[list[int]]:
    """Token ids that the model writes after each recording, without the end token.

    features: one (T, d_model) tensor per utterance at 50 frames/s.
    An answer ends with the end token, or after `tokens_per_second` of its audio (at least 16,
    at most `max_tokens`): nobody speaks faster, and a model that loops is stopped.
    """
    if not features:
        return []
    device = model.lm.lm_head.weight.device
    soft = [model.project(stack_frames(f.to(device), model.config.stack)) for f in features]
    limits = [min(max_tokens, max(16, int(len(f) / 50 * tokens_per_second))) for f in features]
    text = model.lm.embed(torch.tensor([[bos, *prompt_ids]], device=device))[0]
    lengths = torch.tensor([len(s) + len(text) for s in soft], device=device)
    rows, longest = len(soft), int(lengths.max())

    x = torch.zeros(rows, longest, text.shape[-1], dtype=text.dtype, device=device)
    ids = torch.full((rows, longest), bos, device=device)
    has_id = torch.zeros(rows, longest, dtype=torch.bool, device=device)
    for row, tokens in enumerate(soft):
        stop = len(tokens) + len(text)
        x[row, : len(tokens)] = tokens.to(x.dtype)
        x[row, len(tokens) : stop] = text
        ids[row, len(tokens) : stop] = torch.tensor([bos, *prompt_ids], device=device)
        has_id[row, len(tokens) : stop] = True

    # Values have the dtype of the activations: autocast's where it is on.
    probe = model.lm.smear_gate(x[:1, :1, :SMEAR_GATE_CHANNELS])
    cache = KVCache(model.lm.config, rows, longest + max(limits), probe)
    layout = SegmentLayout.plain((rows, longest), device, lengths_B=lengths)
    hidden = layout.last(model.lm.trunk(x, ids, layout, has_id, cache))
    answers: list[list[int]] = [[] for _ in range(rows)]
    open_rows = set(range(rows))
    while open_rows:
        chosen = model.lm.logits(hidden).argmax(-1)
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
            hidden = model.lm.trunk(model.lm.embed(step), step, layout, None, cache)[:, 0]
    return answers
