"""Lay out utterances in packed batches of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from omni.model.batch import IGNORED, Batch, CTCLabels
from omni.model.chat_template import AUDIO
from omni.model.projector import stack_frames


@dataclass(frozen=True)
class Utterance:
    """One utterance as a training worker receives it.

    features: a (T, d) tensor for each recording; None: a recording was rejected, and the utterance
    becomes padding.
    ids: token ids with AUDIO in the place of each recording.
    supervised: True for the ids that are targets.
    transcript_tokens: token ids of what is said in each recording, for distillation and CTC; None
    where it is not known.
    """

    features: Sequence[Tensor] | None
    ids: Sequence[int]
    supervised: Sequence[bool]
    number: int = -1
    """Row of the index."""
    task: int = 0
    transcription: bool = False
    """True where the answer is what is said in the only recording."""
    transcript_tokens: Sequence[Sequence[int] | None] | None = None

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
    summary_tokens: int = 0,
    teacher: bool = False,
    ctc: bool = False,
) -> Batch:
    """Lay out bins of utterances as a `Batch` of (len(bins), positions).

    summary_tokens: positions before the soft tokens of each recording, for its summary. teacher:
    add a batch of the same utterances as text, for distillation. ctc: add what is said in the
    recordings, as far as it is known.
    """
    shape = (len(bins), positions)
    tokens = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    tasks = np.zeros(shape, dtype=np.int64)
    audio: list[Tensor] = []
    said: list[Sequence[int] | None] = []
    for row, members in enumerate(bins):
        cursor = 0
        for segment, utterance in enumerate(members, start=1):
            if utterance.features is None or not all(map(len, utterance.features)):
                continue
            stacked = [stack_frames(features, stack) for features in utterance.features]
            places = [summary_tokens + len(part) for part in stacked]
            ids, supervised = _expand(utterance, places)
            stop = cursor + len(ids) - 1
            if stop > positions:
                raise ValueError(f"bin {row} holds {stop} positions, expected at most {positions}")
            audio += stacked
            said += utterance.transcript_tokens or [None] * len(stacked)
            inputs, wanted = ids[:-1], np.where(supervised[1:], ids[1:], IGNORED)
            mask[row, cursor:stop] = inputs == AUDIO
            tokens[row, cursor:stop] = np.where(inputs == AUDIO, 0, inputs)
            targets[row, cursor:stop] = wanted
            segments[row, cursor:stop] = segment
            tasks[row, cursor:stop] = utterance.task
            cursor = stop
    empty = torch.zeros(0, stack * frame_dim, dtype=torch.bfloat16)
    soft = [len(part) for part in audio]
    starts = np.zeros(sum(soft), dtype=bool)
    starts[np.cumsum([0, *soft])[:-1]] = True
    at = np.flatnonzero(mask)
    is_summary = np.tile([True, False], len(soft)).repeat(
        [count for frames in soft for count in (summary_tokens, frames)]
    )
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        segments_BT=torch.from_numpy(segments),
        audio_mask_BT=torch.from_numpy(mask),
        audio_NF=torch.cat(audio) if audio else empty,
        audio_at_N=torch.from_numpy(at[~is_summary]),
        supervised_S=torch.from_numpy(np.flatnonzero(targets != IGNORED)),
        audio_starts_N=torch.from_numpy(starts),
        summary_at_M=torch.from_numpy(at[is_summary]),
        tasks_BT=torch.from_numpy(tasks),
        ctc=CTCLabels.of(soft, said) if ctc else None,
        teacher=_teacher_batch(bins, positions) if teacher else None,
    )


def _teacher_batch(bins: Sequence[Sequence[Utterance]], positions: int) -> Batch:
    """Lay out the bins with transcripts in the place of the recordings.

    The rows are as long as those of the bins, so that compiled kernels see one length; rows of
    texts with more tokens than their recordings have soft tokens may take a multiple of it.
    """
    written = []
    for members in bins:
        row = []
        for utterance in members:
            if utterance.features is None:
                continue
            transcript = iter(_transcripts(utterance))
            parts = [next(transcript) if token == AUDIO else [token] for token in utterance.ids]
            flags = [[flag] * len(p) for flag, p in zip(utterance.supervised, parts, strict=True)]
            row.append(
                replace(
                    utterance, features=(), ids=list(chain(*parts)), supervised=list(chain(*flags))
                )
            )
        written.append(row)
    longest = max(sum(len(u.ids) - 1 for u in row) for row in written)
    multiple = -(-max(longest, 1) // positions)
    return collate(written, positions=multiple * positions, stack=1, frame_dim=1)


def _transcripts(utterance: Utterance) -> list[Sequence[int]]:
    """Return the transcript of every recording. Raises ValueError where one is not known."""
    given = utterance.transcript_tokens or [None]
    known = [text for text in given if text is not None]
    if len(known) < len(given):
        raise ValueError("a teacher needs the transcript of every recording")
    return known


def _expand(utterance: Utterance, soft: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Repeat each AUDIO id, and its flag, as often as its recording has soft tokens (`soft`)."""
    ids = np.asarray(utterance.ids, dtype=np.int64)
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[ids == AUDIO] = soft
    supervised = np.asarray(utterance.supervised, dtype=bool)
    return ids.repeat(repeats), supervised.repeat(repeats)
