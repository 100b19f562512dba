"""Lay out utterances in packed batches of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from omni.model.batch import IGNORED, Batch
from omni.model.chat_template import AUDIO
from omni.model.projector import stack_frames

# Lengths of teacher batches are rounded up to it, so that few shapes occur.
TEACHER_MULTIPLE = 64


@dataclass(frozen=True)
class Utterance:
    """One utterance as a training worker receives it.

    features: a (T, d) tensor for each recording; None: a recording was rejected, and the utterance
    becomes padding.
    ids: token ids with AUDIO in the place of each recording.
    supervised: True for the ids that are targets.
    teacher_tokens: token ids of the transcript of each recording, for distillation.
    """

    features: Sequence[Tensor] | None
    ids: Sequence[int]
    supervised: Sequence[bool]
    number: int = -1
    """Row of the index."""
    task: int = 0
    teacher_tokens: Sequence[Sequence[int]] | None = None

    @property
    def prompt(self) -> Sequence[int]:
        """Ids before the last answer, which the decoder is given."""
        last = len(self.ids)
        while last and self.supervised[last - 1]:
            last -= 1
        return self.ids[:last]


def collate(
    bins: Sequence[Sequence[Utterance]],
    *,
    positions: int,
    stack: int,
    frame_dim: int,
    teacher: bool = False,
) -> Batch:
    """Lay out bins of utterances as a `Batch` of (len(bins), positions).

    teacher: add a batch of the same utterances as text, for distillation.
    """
    shape = (len(bins), positions)
    tokens = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    tasks = np.zeros(shape, dtype=np.int64)
    audio: list[Tensor] = []
    for row, members in enumerate(bins):
        cursor = 0
        for segment, utterance in enumerate(members, start=1):
            if utterance.features is None or not all(map(len, utterance.features)):
                continue
            stacked = [stack_frames(features, stack) for features in utterance.features]
            ids, supervised = _expand(utterance, [len(part) for part in stacked])
            stop = cursor + len(ids) - 1
            if stop > positions:
                raise ValueError(f"bin {row} holds {stop} positions, expected at most {positions}")
            audio += stacked
            inputs, wanted = ids[:-1], np.where(supervised[1:], ids[1:], IGNORED)
            mask[row, cursor:stop] = inputs == AUDIO
            tokens[row, cursor:stop] = np.where(inputs == AUDIO, 0, inputs)
            targets[row, cursor:stop] = wanted
            segments[row, cursor:stop] = segment
            tasks[row, cursor:stop] = utterance.task
            cursor = stop
    empty = torch.zeros(0, stack * frame_dim, dtype=torch.bfloat16)
    starts = np.zeros(sum(map(len, audio)), dtype=bool)
    starts[np.cumsum([0, *map(len, audio)])[:-1]] = True
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        segments_BT=torch.from_numpy(segments),
        audio_mask_BT=torch.from_numpy(mask),
        audio_NF=torch.cat(audio) if audio else empty,
        audio_starts_N=torch.from_numpy(starts),
        tasks_BT=torch.from_numpy(tasks),
        teacher=_teacher_batch(bins) if teacher else None,
    )


def _teacher_batch(bins: Sequence[Sequence[Utterance]]) -> Batch:
    """Lay out the bins with transcripts in the place of the recordings, as long as the longest."""
    written = []
    for members in bins:
        row = []
        for utterance in members:
            if utterance.features is None:
                continue
            if utterance.teacher_tokens is None:
                raise ValueError("a teacher needs the transcript of every recording")
            transcript = iter(utterance.teacher_tokens)
            parts = [next(transcript) if token == AUDIO else [token] for token in utterance.ids]
            flags = [[flag] * len(p) for flag, p in zip(utterance.supervised, parts, strict=True)]
            row.append(
                replace(
                    utterance, features=(), ids=list(chain(*parts)), supervised=list(chain(*flags))
                )
            )
        written.append(row)
    longest = max(sum(len(u.ids) - 1 for u in row) for row in written)
    positions = -(-max(longest, 1) // TEACHER_MULTIPLE) * TEACHER_MULTIPLE
    return collate(written, positions=positions, stack=1, frame_dim=1)


def _expand(utterance: Utterance, soft: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Repeat each AUDIO id, and its flag, as often as its recording has soft tokens."""
    ids = np.asarray(utterance.ids, dtype=np.int64)
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[ids == AUDIO] = soft
    supervised = np.asarray(utterance.supervised, dtype=bool)
    return ids.repeat(repeats), supervised.repeat(repeats)
