"""The layout of a packed sequence, position by position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omni.model.batch import IGNORED, Batch
from omni.plan.sequences import sequence_positions
from omni.stream.collate import Utterance, collate
from tests.helpers.utterances import spoken

BOS, END = 50, 51
FRAMES = torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]])
# Three frames, stacked by two: two soft tokens, the second half padding.
LONG = spoken(FRAMES, [7], [8, 9], bos=BOS, end=END)
SHORT = spoken(-FRAMES[:1], (), [5], bos=BOS, end=END)
REJECTED = replace(LONG, features=None)


def _collate(*bins: list[Utterance], positions: int = 10) -> Batch:
    return collate(bins, positions=positions, stack=2, frame_dim=2)


def test_soft_tokens_bos_prompt_text_and_the_next_utterance() -> None:
    batch = _collate([LONG, SHORT])
    x, pad = IGNORED, 0  # what audio and padding positions hold is read by nobody
    assert batch.tokens_BT.tolist() == [[pad, pad, BOS, 7, 8, 9, pad, BOS, 5, pad]]
    assert batch.targets_BT.tolist() == [[x, x, x, 8, 9, END, x, 5, END, x]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch.audio_mask_BT.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert batch.audio_NF.tolist() == [
        [1.0, 1.5, 2.0, 2.5],
        [3.0, 3.5, 0.0, 0.0],
        [-1.0, -1.5, 0.0, 0.0],
    ]


def test_types_are_those_of_the_contract() -> None:
    batch = _collate([LONG], [SHORT])
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.segments_BT.dtype == torch.int64
    assert batch.audio_mask_BT.dtype == torch.bool
    assert batch.audio_NF.dtype == torch.float32
    half = spoken(FRAMES.bfloat16(), (), [5], bos=BOS, end=END)
    assert _collate([half]).audio_NF.dtype == torch.bfloat16


def test_audio_follows_the_mask_row_by_row() -> None:
    batch = _collate([SHORT], [LONG, SHORT])
    assert batch.tokens_BT.shape == (2, 10)
    assert batch.audio_mask_BT.sum(1).tolist() == [1, 3]
    assert batch.audio_NF[:, 0].tolist() == [-1.0, 1.0, 3.0, -1.0]


def test_the_prompt_is_not_supervised_and_the_end_token_is() -> None:
    batch = _collate([LONG])
    supervised = batch.targets_BT[0] != IGNORED
    assert batch.tokens_BT[0, supervised].tolist() == [7, 8, 9], "the last of the prompt predicts"
    assert batch.targets_BT[0, supervised].tolist() == [8, 9, END]
    assert END not in batch.tokens_BT, "the end is a target, never an input"


def test_a_rejected_utterance_leaves_padding() -> None:
    batch = _collate([LONG, REJECTED, SHORT])
    whole = _collate([LONG, SHORT])
    assert batch.segments_BT.tolist() == [[1, 1, 1, 1, 1, 1, 3, 3, 3, 0]]
    for name in ("tokens_BT", "targets_BT", "audio_mask_BT", "audio_NF"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))


@pytest.mark.parametrize("members", [[], [REJECTED], [REJECTED, REJECTED]])
def test_a_bin_of_nothing_is_padding(members: list[Utterance]) -> None:
    batch = _collate(members)
    assert (batch.targets_BT == IGNORED).all()
    assert not batch.segments_BT.any() and not batch.audio_mask_BT.any()
    assert batch.audio_NF.shape == (0, 4)


def test_a_bin_may_be_full_but_not_too_full() -> None:
    assert (_collate([LONG, SHORT], positions=9).segments_BT > 0).all()
    with pytest.raises(ValueError, match=r"bin 1\b.*\b9\b.*\b8\b"):
        _collate([SHORT], [LONG, SHORT], positions=8)


@pytest.mark.parametrize("stack", [1, 2, 4, 5])
def test_the_plan_counts_the_positions_that_are_used(stack: int) -> None:
    random = np.random.default_rng(stack)
    for frames, prompt, text in random.integers([1, 0, 0], [40, 5, 30], (50, 3)).tolist():
        utterance = spoken(torch.zeros(frames, 3), [1] * prompt, [2] * text, bos=0, end=3)
        need = sequence_positions([frames], len(utterance.ids), stack)
        batch = collate([[utterance]], positions=need, stack=stack, frame_dim=3)
        assert (batch.segments_BT == 1).all()
        with pytest.raises(ValueError, match=rf"\b{need}\b"):
            collate([[utterance]], positions=need - 1, stack=stack, frame_dim=3)


def test_rows_of_teachers_are_as_long_as_bins_whatever_they_hold() -> None:
    """Compiled kernels keep few lengths; a longer text takes a multiple."""
    for text, length in (([5], 12), ([5] * 5, 12), ([5] * 11, 24)):
        said = replace(SHORT, transcript_tokens=[text])
        batch = collate([[said], []], positions=12, stack=2, frame_dim=2, teacher=True)
        assert batch.teacher is not None and batch.teacher.tokens_BT.shape == (2, length)


def test_labels_of_ctc_are_laid_out_with_their_lengths() -> None:
    other = replace(LONG, transcript_tokens=[None])
    batch = collate([[LONG, other], [SHORT]], positions=12, stack=2, frame_dim=2, ctc=True)
    assert batch.ctc is not None and batch.ctc.rows_N is not None
    assert batch.ctc.rows_N.tolist() == [0, 1, 4], "two of LONG, none of the other task, one"
    assert (batch.ctc.soft_lengths, batch.ctc.lengths) == ((2, 1), (2, 1))
    assert batch.ctc.tokens_L.tolist() == [8, 9, 5]
    assert batch.ctc.classes_K[batch.ctc.class_L].tolist() == [8, 9, 5]
    assert _collate([LONG]).ctc is None
