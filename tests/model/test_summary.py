"""Summary tokens: a recording is pooled by itself, packed or alone, in training and decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from omni.config import parse_config
from omni.model.batch import Batch
from omni.model.chat_template import AUDIO
from omni.model.lm.generate import generate
from omni.model.projector import stack_frames
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.summary import SummaryPool
from omni.run.prepare import prepare
from omni.stream.collate import Utterance, collate
from tests.helpers.small_gpt import SMALL, awaken
from tests.helpers.utterances import spoken

BOS, END = 90, 94
TOKENS, STACK, WIDTH = 2, 4, 16
CONFIG = OmniConfig(SMALL, feature_dim=WIDTH, stack=STACK, ctc=True, summary_tokens=TOKENS)


def _recording(frames: int, seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(frames, width, generator=torch.Generator().manual_seed(seed))


def _pool(layers: int = 3) -> SummaryPool:
    pool = SummaryPool(TOKENS, STACK, layers, WIDTH, 24)
    awaken(pool)
    return pool


def _stacked(*recordings: Tensor) -> tuple[Tensor, Tensor, int]:
    stacked = [stack_frames(part, STACK) for part in recordings]
    starts = torch.cat([torch.arange(len(part)) == 0 for part in stacked])
    return torch.cat(stacked), starts, len(recordings)


def _pooled(pool: SummaryPool, *recordings: Tensor) -> Tensor:
    pooled: Tensor = pool(*_stacked(*recordings))
    return pooled


def test_a_summary_is_made_of_weighted_means_and_deviations() -> None:
    pool = _pool()
    x = _recording(7, 0, 3 * WIDTH)  # Seven frames do not fill two stacks.
    weights = torch.softmax(torch.tanh(pool.hidden(x)) @ pool.scores, 0)[:, None]
    mean = (weights * x).sum(0)
    deviation = ((weights * (x - mean) ** 2).sum(0) + 1e-5).sqrt()
    statistics = torch.cat((mean, deviation)).view(6, WIDTH)
    standard = (statistics - pool.centre.view(6, WIDTH)) * pool.gain[:, None]
    narrow = pool.narrow(standard.flatten())
    wanted = torch.stack([pool.norm_out(narrow @ pool.out[token]) for token in range(TOKENS)])
    torch.testing.assert_close(_pooled(pool, x), wanted, rtol=1e-5, atol=1e-5)


def test_statistics_are_centred_and_scaled_by_the_first_recordings() -> None:
    pool = SummaryPool(TOKENS, STACK, 2, WIDTH, 24)
    recordings = [3.0 + (1 + n) * _recording(9 + n, n, 2 * WIDTH) for n in range(5)]
    assert not pool.fit([_stacked(recordings[0])])  # One recording has no deviation.
    assert pool.fit([_stacked(*recordings[1:3]), _stacked(*recordings[3:])])
    statistics = torch.stack(
        [torch.cat((x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt())) for x in recordings]
    )
    torch.testing.assert_close(pool.centre.data, statistics.mean(0))
    standard = ((statistics - pool.centre) * pool.gain.repeat_interleave(WIDTH)).view(5, 4, WIDTH)
    torch.testing.assert_close(standard.square().mean((0, 2)), torch.ones(4), rtol=1e-4, atol=0)
    before = pool.centre.clone()
    assert pool.fit([_stacked(*recordings[:2])])
    assert torch.equal(pool.centre, before)


def test_recordings_are_pooled_apart() -> None:
    pool = _pool(layers=1)
    parts = [_recording(n, n) for n in (9, 3, 40)]
    alone = torch.cat([_pooled(pool, part) for part in parts])
    torch.testing.assert_close(_pooled(pool, *parts), alone, rtol=1e-5, atol=1e-6)


def test_a_recording_of_zeros_and_a_batch_without_recordings_have_finite_gradients() -> None:
    pool = _pool(layers=1)
    _pooled(pool, torch.zeros(8, WIDTH), _recording(5, 1)).sum().backward()
    empty = pool(torch.zeros(0, STACK * WIDTH), torch.zeros(0, dtype=torch.bool), 0)
    assert empty.shape == (0, 24)
    empty.sum().backward()
    for name, parameter in pool.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# --- in a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> OmniModel:
    model = OmniModel(CONFIG).eval()
    awaken(model)
    return model


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    texts = [[5, 6, 7], [8, 8, 9, 10], [11]]
    made = [
        spoken(_recording(20 + 7 * n, n), [20 + n], text, bos=BOS, end=END)
        for n, text in enumerate(texts)
    ]
    # A conversation has several recordings, each with its own summary.
    two = [_recording(10, 8), _recording(13, 9)]
    ids = [AUDIO, BOS, 30, AUDIO, 31, 40, 41, END]
    asked = Utterance(two, ids, [False] * 5 + [True] * 3, transcript_tokens=[[50, 51], None])
    return [*made, asked]


def _lay_out(*bins: list[Utterance], positions: int = 160) -> Batch:
    return collate(
        bins, positions=positions, stack=STACK, frame_dim=WIDTH, summary_tokens=TOKENS, ctc=True
    )


def test_each_recording_has_its_places_before_its_frames(utterances: list[Utterance]) -> None:
    batch = _lay_out([utterances[0]], [utterances[3]])
    assert batch.summary_at_M[:TOKENS].tolist() == [0, 1]
    assert len(batch.summary_at_M) == 3 * TOKENS
    places = torch.cat((batch.audio_at_N, batch.summary_at_M)).sort().values
    assert places.tolist() == batch.audio_mask_BT.flatten().nonzero().squeeze(1).tolist()
    for summary, frames in zip(
        batch.summary_at_M[TOKENS - 1 :: TOKENS],
        batch.audio_at_N[batch.audio_starts_N],
        strict=True,
    ):
        assert int(frames) == int(summary) + 1


@torch.inference_mode()
def test_losses_add_up_over_any_packing(model: OmniModel, utterances: list[Utterance]) -> None:
    whole = model(_lay_out(utterances))
    parts = [model(_lay_out([utterance])) for utterance in utterances]
    for name in ("loss", "ctc", "correct"):
        total = sum(float(getattr(part, name)) for part in parts)
        assert float(getattr(whole, name)) == pytest.approx(total, rel=1e-4), name


@torch.inference_mode()
def test_decoding_continues_what_training_sees(
    model: OmniModel, utterances: list[Utterance]
) -> None:
    """Greedy answers, given as the text of a batch, are what the batch predicts."""
    prompts = [utterance.prompt for utterance in utterances]
    features = [utterance.features or () for utterance in utterances]
    answers = generate(model, prompts, features, end=END, max_new_tokens=6)
    for utterance, answer in zip(utterances, answers, strict=True):
        ids = [*utterance.prompt, *answer.ids]
        flags = [False] * len(utterance.prompt) + [True] * len(answer.ids)
        sums = model(_lay_out([replace(utterance, ids=ids, supervised=flags)]))
        assert int(sums.correct) == len(answer.ids) > 0


def test_the_summary_trains_and_ctc_alone_leaves_it_alone(utterances: list[Utterance]) -> None:
    model = OmniModel(CONFIG)
    model.init_weights(0)
    sums = model(_lay_out(utterances), ctc_only=True)
    sums.ctc.backward()
    assert model.summary is not None
    assert all(parameter.grad is None for parameter in model.summary.parameters())
    # A fresh GPT adds nothing to the residual stream, and fresh scores are zero.
    awaken(model)
    model(_lay_out(utterances)).loss.backward()
    for name, parameter in model.summary.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained != (name in ("centre", "gain")), name


def test_models_without_summary_tokens_keep_their_fingerprint() -> None:
    plain = replace(CONFIG, summary_tokens=0)
    assert "summary_tokens" not in plain.to_dict()
    for config in (plain, CONFIG):
        assert OmniConfig.from_dict(config.to_dict()) == config


def test_the_plan_reserves_their_positions(tmp_path: Any) -> None:
    def lengths(summary_tokens: int) -> np.ndarray:
        given = {
            "run": {"storage": str(tmp_path)},
            "data": {"train": ["embedded:dev"], "dev": ["embedded:test"]},
            "model": {"n_layer": 1, "n_embd": 32, "summary_tokens": summary_tokens},
            "optim": {"steps": 2, "bin_positions": 512},
        }
        return prepare(parse_config(given)).lengths

    assert (lengths(3) - lengths(0) == 3).all()
