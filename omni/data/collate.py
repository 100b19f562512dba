"""Utterances to packed batches: the layout of a sequence is decided here and nowhere else.

| soft tokens | <|bos|> | prompt | text | <|assistant_end|> |
                                   ^^^^^^^^^^^^^^^^^^^^^^^^^ supervised
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni.model.batch import IGNORED, Batch
from omni.model.projector import soft_tokens, stack_frames


@dataclass(frozen=True)
class Utterance:
    """One utterance as the worker gets it. features_TF is None where the recording was rejected:
    its slot stays in the plan and becomes padding."""

    features_TF: Tensor | None
    prompt_ids: Sequence[int]
    text_ids: Sequence[int]
    number: int = -1  # row of the index


def sequence_positions(frames: int, prompt: int, text: int, stack: int) -> int:
    """Positions an utterance takes in a bin; the end token is a target, not an input."""
    return soft_tokens(frames, stack) + 1 + prompt + text


def collate(
    bins: Sequence[Sequence[Utterance]],
    *,
    positions: int,
    stack: int,
    feature_dim: int,
    bos: int,
    end: int,
) -> Batch:
    """Lay out bins of utterances as a `Batch` of (len(bins), positions)."""
    shape = (len(bins), positions)
    tokens = np.full(shape, bos, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    audio: list[Tensor] = []
    for row, members in enumerate(bins):
        cursor = 0
        for segment, utterance in enumerate(members, start=1):
            if utterance.features_TF is None or not len(utterance.features_TF):
                continue
            stacked = stack_frames(utterance.features_TF, stack)
            ids = [bos, *utterance.prompt_ids, *utterance.text_ids]
            text_at = cursor + len(stacked)
            stop = text_at + len(ids)
            if stop > positions:
                raise ValueError(f"bin {row} holds {stop} positions, expected at most {positions}")
            audio.append(stacked)
            mask[row, cursor:text_at] = True
            tokens[row, text_at:stop] = ids
            answer = [*utterance.text_ids, end]
            targets[row, stop - len(answer) : stop] = answer
            segments[row, cursor:stop] = segment
            cursor = stop
    empty = torch.zeros(0, stack * feature_dim, dtype=torch.bfloat16)
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        segments_BT=torch.from_numpy(segments),
        audio_mask_BT=torch.from_numpy(mask),
        audio_NF=torch.cat(audio) if audio else empty,
    )
