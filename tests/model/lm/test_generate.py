"""Batched decoding with a cache writes what a naive loop writes, one utterance at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from omni.model.chat_template import AUDIO
from omni.model.lm.generate import Answer, generate
from omni.model.projector import stack_frames
from omni.model.speech_lm import OmniConfig, OmniModel
from tests.helpers.small_gpt import SMALL, awaken

BOS, NEVER = 90, 99  # NEVER: a token that the model cannot write, for answers without an end
LENGTHS = [30, 250, 77, 1, 400]  # frames at 50 per second; 400 make 100 soft tokens
LIMIT = 97
LIMITS = [16, 60, 18, 16, 96]  # of older versions: 12 tokens per second of audio, at least 16


@pytest.fixture(scope="module")
def model() -> OmniModel:
    model = OmniModel(OmniConfig(SMALL, feature_dim=8)).eval()
    awaken(model, seed=2)
    with torch.no_grad():
        # Its logit is always zero, which is never the largest.
        model.lm.lm_head.weight[NEVER].zero_()
    return model


@pytest.fixture(scope="module")
def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, 8, generator=generator) for length in LENGTHS]


def write(
    model: OmniModel, features: list[Tensor], prompt: Sequence[int] = (), **settings: Any
) -> list[list[int]]:
    """What the model writes about each recording by itself."""
    settings = {"max_new_tokens": LIMIT, **settings}
    answers = generate(
        model, [[AUDIO, BOS, *prompt] for _ in features], [[f] for f in features], **settings
    )
    return [answer.ids for answer in answers]


@torch.inference_mode()
def naive(model: OmniModel, feature: Tensor, prompt: list[int], limit: int, end: int) -> list[int]:
    """Greedy decoding of one utterance: the whole sequence again for every token."""
    soft = model.project(stack_frames(feature, model.config.stack))[None]
    answer: list[int] = []
    while len(answer) < limit:
        idx = torch.tensor([[BOS, *prompt, *answer]])
        token = int(model.lm(idx, audio_features=soft)[0, -1].argmax())
        if token == end:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("prompt", [[], [7, 11, 13]], ids=["no prompt", "prompt"])
def test_a_batch_of_different_lengths_equals_the_naive_loop(
    model: OmniModel, features: list[Tensor], prompt: list[int]
) -> None:
    wanted = [naive(model, feature, prompt, LIMIT, NEVER) for feature in features]
    assert len({tuple(answer[:8]) for answer in wanted}) == len(features), "they hear their audio"
    # 100 soft tokens and 97 of text: past the short window of 128.
    assert write(model, features, prompt, end=NEVER) == wanted


def test_an_answer_stops_before_the_end_token_and_others_go_on(
    model: OmniModel, features: list[Tensor]
) -> None:
    endless = write(model, features, end=NEVER)
    end = endless[1][20]
    answers = write(model, features, end=end)
    cut = [a[: a.index(end)] if end in a else a for a in endless]
    assert answers == cut
    assert len(answers[1]) <= 20 < len(endless[1])


def test_an_answer_may_be_empty(model: OmniModel, features: list[Tensor]) -> None:
    (endless,) = write(model, features[:1], end=NEVER)
    assert write(model, features[:1], end=endless[0]) == [[]]


def test_an_answer_without_an_end_is_cut_at_the_limit(
    model: OmniModel, features: list[Tensor]
) -> None:
    (endless,) = write(model, features[:1], end=NEVER, max_new_tokens=20)
    end = endless[10]
    length = endless.index(end)
    prompts, given = [[AUDIO, BOS]], [features[:1]]
    assert len(endless) == 20
    # The end token counts: an answer and its end just fit.
    for limit, cut in ((length + 5, False), (length + 1, False), (length, True)):
        found = generate(model, prompts, given, end=end, max_new_tokens=limit)
        assert found == [Answer(endless[:length], cut)]
    assert generate(model, prompts, given, end=NEVER, max_new_tokens=5) == [
        Answer(endless[:5], True)
    ]


def test_limits_of_older_versions_follow_the_length_of_the_audio(
    model: OmniModel, features: list[Tensor]
) -> None:
    answers = write(model, features, end=NEVER, max_new_tokens=None)
    assert [len(answer) for answer in answers] == LIMITS
    whole = write(model, features, end=NEVER)
    assert answers == [a[:limit] for a, limit in zip(whole, LIMITS, strict=True)]


def test_decoding_leaves_no_trace_in_the_model(model: OmniModel, features: list[Tensor]) -> None:
    first = write(model, features[:2], end=NEVER)
    assert write(model, features[:2], end=NEVER) == first
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.inference_mode()
def test_prompts_of_different_lengths_and_several_recordings(
    model: OmniModel, features: list[Tensor]
) -> None:
    a, b, c, *_ = features
    prompts = [[BOS, 7, AUDIO, 11, AUDIO, 13], [AUDIO, BOS]]
    settings = {"end": NEVER, "max_new_tokens": 30}
    together = generate(model, prompts, [[a, c], [b]], **settings)
    alone = generate(model, prompts[:1], [[a, c]], **settings)
    alone += generate(model, prompts[1:], [[b]], **settings)
    assert together == alone
    # By the front door: packed soft tokens among ids, the whole sequence for every token.
    soft = [model.project(stack_frames(f, model.config.stack)) for f in (a, c)]
    answer: list[int] = []
    for _ in range(5):
        ids = [BOS, 7, *[0] * len(soft[0]), 11, *[0] * len(soft[1]), 13, *answer]
        mask = torch.tensor([token == 0 for token in ids])[None]
        logits = model.lm(torch.tensor([ids]), audio_features=torch.cat(soft), audio_mask=mask)
        answer.append(int(logits[0, -1].argmax()))
    assert together[0].ids[:5] == answer


def test_nothing_to_write_down(model: OmniModel) -> None:
    assert generate(model, [], [], end=2) == []
