"""Utterances to packed batches of fixed shape."""

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

TEACHER_GRAIN = 64  # positions: few shapes


@dataclass(frozen=True)
class Utterance:
    """One utterance as the worker gets it: ids in which AUDIO stands for a recording.

    features: a (T, d) tensor for each AUDIO; None where a recording was rejected: the utterance's
    slot stays in the plan and becomes padding.
    supervised: which ids are to be learnt. heard: only where a teacher reads it.
    """

    features: Sequence[Tensor] | None
    ids: Sequence[int]
    supervised: Sequence[bool]
    number: int = -1  # row of the index
    task: int = 0
    heard: Sequence[Sequence[int]] | None = None  # ids of what each recording says

    @property
    def prompt(self) -> Sequence[int]:
        """What stands before the last answer: what a decoder is given."""
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

    teacher: with one more batch of the same utterances as text, as long as its longest bin.
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
            given, wanted = ids[:-1], np.where(supervised[1:], ids[1:], IGNORED)
            mask[row, cursor:stop] = given == AUDIO
            tokens[row, cursor:stop] = np.where(given == AUDIO, 0, given)
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
        teacher=_as_text(bins) if teacher else None,
    )


def _as_text(bins: Sequence[Sequence[Utterance]]) -> Batch:
    """The bins with what is said in the place of the recordings."""
    written = []
    for members in bins:
        row = []
        for utterance in members:
            if utterance.features is None:
                continue
            if utterance.heard is None:
                raise ValueError("a teacher needs the transcript of every recording")
            said = iter(utterance.heard)
            parts = [next(said) if token == AUDIO else [token] for token in utterance.ids]
            flags = [[flag] * len(p) for flag, p in zip(utterance.supervised, parts, strict=True)]
            row.append(
                replace(
                    utterance, features=(), ids=list(chain(*parts)), supervised=list(chain(*flags))
                )
            )
        written.append(row)
    longest = max(sum(len(u.ids) - 1 for u in row) for row in written)
    positions = -(-max(longest, 1) // TEACHER_GRAIN) * TEACHER_GRAIN
    return collate(written, positions=positions, stack=1, frame_dim=1)


def _expand(utterance: Utterance, soft: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """ids and supervision with each AUDIO repeated for its soft tokens."""
    ids = np.asarray(utterance.ids, dtype=np.int64)
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[ids == AUDIO] = soft
    supervised = np.asarray(utterance.supervised, dtype=bool)
    return ids.repeat(repeats), supervised.repeat(repeats)
