"""Choices are scored as the answers that training would learn, one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni.inference.choices import add_choice_scores, another_recording, answers_of, score_choices
from omni.model.chat_template import AUDIO, Template
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.stream.collate import Utterance, collate
from tests.helpers.hf_folders import wrapped
from tests.helpers.small_gpt import SMALL, awaken

CHOICES = ("no", "not sure", "no way")


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(SpeechTokenizer.train(["no", "not sure", "no way", "yes what is it"] * 5, 280))


@pytest.fixture(scope="module", params=["gpt", "summary", "mistral"])
def model(template: Template, request: pytest.FixtureRequest) -> OmniModel:
    """A GPT, one that reads summary tokens, and a transformers model with a sliding window."""
    if request.param == "mistral":
        lm = wrapped("mistral", initializer_range=0.3)
        made = OmniModel(OmniConfig(lm.config, feature_dim=8, stack=2), lm).eval()
        awaken(made.projector)
        return made
    shape = replace(SMALL, vocab_size=template.tokenizer.vocab_size)
    summary = 3 if request.param == "summary" else 0
    made = OmniModel(OmniConfig(lm=shape, feature_dim=8, stack=2, summary_tokens=summary)).eval()
    awaken(made)
    return made


def _utterance(template: Template, frames: int, seed: int) -> Utterance:
    generator = torch.Generator().manual_seed(seed)
    prompt = [
        AUDIO,
        template.tokenizer.bos or 0,
        *template.tokenizer.encode_batch(["what is it"])[0],
    ]
    features = [torch.randn(frames, 8, generator=generator)]
    return Utterance(features, prompt, [False] * len(prompt), number=seed)


def _alone(model: OmniModel, utterance: Utterance, answer: list[int]) -> float:
    ids = [*utterance.ids, *answer]
    flags = [False] * len(utterance.ids) + [True] * len(answer)
    whole = replace(utterance, ids=ids, supervised=flags)
    with torch.inference_mode():
        summary = model.config.summary_tokens
        batch = collate([[whole]], positions=120, stack=2, frame_dim=8, summary_tokens=summary)
        return -float(model(batch).loss)


def test_choices_have_the_loss_of_their_answer_and_its_end(
    model: OmniModel, template: Template
) -> None:
    asked = [_utterance(template, frames, n) for n, frames in enumerate((30, 11, 48))]
    others = ("yes", "no")
    found = score_choices(model, template, asked, [CHOICES, others, CHOICES])
    assert [tuple(scores) for scores in found] == [CHOICES, others, CHOICES]
    for utterance, scores in zip(asked, found, strict=True):
        answers = dict(zip(scores, answers_of(tuple(scores), template), strict=True))
        assert all(answer[-1] == template.end for answer in answers.values())
        for text, score in scores.items():
            assert score == pytest.approx(_alone(model, utterance, answers[text]), abs=1e-3)


def test_a_choice_that_begins_another_is_paid_for_its_end(
    model: OmniModel, template: Template
) -> None:
    [scores] = score_choices(model, template, [_utterance(template, 20, 3)], [CHOICES])
    first, longer = answers_of(("no", "no way"), template)
    if first[:-1] != longer[: len(first) - 1]:
        pytest.skip("the tokenizer merged the prefix")
    without_end = _alone(model, _utterance(template, 20, 3), first[:-1])
    assert scores["no"] < without_end and scores["no way"] < without_end


def test_rows_of_closed_tasks_get_scores_with_both_recordings(
    model: OmniModel, template: Template
) -> None:
    asked = [_utterance(template, 20 + 7 * n, n) for n in range(3)]
    rows = [{"id": str(n), "task": "sure" if n < 2 else "transcribe"} for n in range(3)]
    add_choice_scores(rows, asked, ["a", "b", "c"], {"sure": CHOICES}, model, template)
    assert "choices" not in rows[2]
    swapped = [
        replace(asked[0], features=asked[1].features),
        replace(asked[1], features=asked[0].features),
    ]
    expected = score_choices(model, template, swapped, [CHOICES] * 2)
    for row, other in zip(rows, expected, strict=False):
        assert row["shuffled_choices"] == pytest.approx(other, abs=1e-3)
        assert row["choices"] != pytest.approx(other, abs=1e-3)
    alone = [{"id": "1", "task": "sure"}]
    add_choice_scores(alone, asked[:1], ["a"], {"sure": CHOICES}, model, template)
    assert "choices" in alone[0] and "shuffled_choices" not in alone[0]


@pytest.mark.parametrize(
    ("recordings", "expected"),
    [
        ("", []),
        ("a", [None]),
        ("aa", [None, None]),
        ("ab", [1, 0]),
        ("abc", [1, 2, 0]),
        ("aabb", [2, 2, 0, 0]),
        ("abba", [1, 3, 3, 1]),
    ],
)
def test_each_recording_is_paired_with_another(recordings: str, expected: list[int | None]) -> None:
    assert another_recording(recordings) == expected
