"""Score the choices of closed tasks by their likelihood, with the true and with other audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omni.model.chat_template import Template, transcription
from omni.model.lm.answer_scores import answer_log_probs
from omni.model.lm.generate import continue_prompts
from omni.model.lm.prompts import embed_prompt
from omni.model.speech_lm import OmniModel
from omni.plan.sequences import sequence_positions
from omni.storage.digest import digest
from omni.stream.collate import Utterance

_ROWS = 16
"""Most utterances whose keys and values are in memory at a time."""
_POSITIONS = 16_384
"""Most positions of them, answers included; one utterance may have more."""


def answers_of(texts: Sequence[str], template: Template) -> list[list[int]]:
    """Encode choices as the answers that a model learns: token ids up to the end token."""
    answers = []
    for one in template.render([transcription("", text) for text in texts]):
        first = len(one.ids)
        while first and one.supervised[first - 1]:
            first -= 1
        answers.append(one.ids[first : one.ids.index(template.end, first) + 1])
    return answers


@torch.inference_mode()
def score_choices(
    model: OmniModel,
    template: Template,
    utterances: Sequence[Utterance],
    choices: Sequence[Sequence[str]],
) -> list[dict[str, float]]:
    """Compute log P(choice, end | audio, prompt) of each choice of each utterance, in nats.

    choices: of each utterance. The end token is part of each answer, so that a choice which begins
    another one is not favoured by being its prefix. Audio and prompt are read once for all choices.
    """
    end = template.end
    known = {
        texts: [answer[:-1] for answer in answers_of(texts, template)]
        for texts in dict.fromkeys(map(tuple, choices))
    }
    answers = [known[tuple(texts)] for texts in choices]
    lengths = [
        _positions(model, utterance) + sum(map(len, of_row))
        for utterance, of_row in zip(utterances, answers, strict=True)
    ]
    order = sorted(range(len(answers)), key=lambda i: (lengths[i], i))
    found: dict[int, list[float]] = {}
    while order:
        count = max(1, min(_ROWS, _POSITIONS // lengths[order[-1]]))
        group, order = order[-count:], order[:-count]
        prompts = [
            embed_prompt(model, utterances[i].prompt, _features(utterances[i])) for i in group
        ]
        read = continue_prompts(model.lm, prompts, end, [1] * len(group), keep=True)
        held = [one.held for one in read if one.held is not None]
        scored = answer_log_probs(model, held, [answers[i] for i in group], end)
        found |= dict(zip(group, scored, strict=True))
    return [dict(zip(texts, found[i], strict=True)) for i, texts in enumerate(map(tuple, choices))]


def _positions(model: OmniModel, utterance: Utterance) -> int:
    frames = [len(part) for part in _features(utterance)]
    config = model.config
    return sequence_positions(frames, len(utterance.prompt), config.stack, config.summary_tokens)


def add_choice_scores(
    rows: Sequence[dict[str, Any]],
    utterances: Sequence[Utterance],
    recordings: Sequence[Any],
    choices: Mapping[str, Sequence[str]],
    model: OmniModel,
    template: Template,
) -> None:
    """Add `choices` and `shuffled_choices` to the transcript rows of closed tasks.

    utterances, recordings: of each row, its input and what names its recording. choices: by task.
    `shuffled_choices` are given the audio of another closed utterance; a row has none where there
    is no other recording.
    """
    closed = [i for i, row in enumerate(rows) if row.get("task") in choices]
    # In a random order: those that follow each other in a bin may be alike, such as in length.
    closed.sort(key=lambda i: digest(f"{recordings[i]} {rows[i]['id']}"))
    texts = [choices[rows[i]["task"]] for i in closed]
    true = [utterances[i] for i in closed]
    for i, scores in zip(closed, score_choices(model, template, true, texts), strict=True):
        rows[i]["choices"] = scores
    others = another_recording([recordings[i] for i in closed])
    swapped = [
        (i, replace(mine, features=audio_for(mine, true[other])), of_row)
        for i, mine, other, of_row in zip(closed, true, others, texts, strict=True)
        if other is not None
    ]
    inputs = [utterance for _, utterance, _ in swapped]
    shuffled = score_choices(model, template, inputs, [of_row for _, _, of_row in swapped])
    for (i, _, _), scores in zip(swapped, shuffled, strict=True):
        rows[i]["shuffled_choices"] = scores


def another_recording(recordings: Sequence[Any]) -> list[int | None]:
    """Pair each position with the next one, around the end, that has another recording.

    None: all are the same.
    """
    count = len(recordings)
    following: list[int | None] = [None] * count
    other: int | None = None  # the next position that differs from the one after
    for i in reversed(range(2 * count)):
        here, after = i % count, (i + 1) % count
        if recordings[here] != recordings[after]:
            other = after
        following[here] = other
    return following


def audio_for(utterance: Utterance, other: Utterance) -> list[Tensor]:
    """Return as many recordings as `utterance` has, taken from `other`."""
    given = _features(other)
    return [given[i % len(given)] for i in range(len(_features(utterance)))]


def _features(utterance: Utterance) -> Sequence[Tensor]:
    return utterance.features or ()
