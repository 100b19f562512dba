"""Score the choices of closed tasks by their likelihood, with the true and with other audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from omni.model.chat_template import Template, transcription
from omni.model.lm.answer_scores import answer_log_probs
from omni.model.lm.generate import embed_prompts
from omni.model.speech_lm import OmniModel
from omni.stream.collate import Utterance

_BATCH = 32


@dataclass(frozen=True)
class Choices:
    """The answers of a closed task, as text and as token ids without the end token."""

    texts: tuple[str, ...]
    ids: list[list[int]]

    @classmethod
    def of(cls, texts: Sequence[str], template: Template) -> Choices:
        rendered = template.render([transcription("", text) for text in texts])
        answers = []
        for one in rendered:
            first = len(one.ids)
            while first and one.supervised[first - 1]:
                first -= 1
            answers.append(one.ids[first : one.ids.index(template.end, first)])
        return cls(tuple(texts), answers)


def score_choices(
    model: OmniModel,
    template: Template,
    utterances: Sequence[Utterance],
    choices: Sequence[Sequence[str]],
) -> list[dict[str, float]]:
    """Compute log P(choice, end | audio, prompt) of each choice of each utterance, in nats.

    choices: of each utterance. The end token is part of each answer, so that a choice which begins
    another one is not favoured by being its prefix.
    """
    known = {tuple(texts): Choices.of(texts, template) for texts in choices}
    of_row = [known[tuple(texts)] for texts in choices]
    order = sorted(range(len(utterances)), key=lambda i: sum(map(len, _features(utterances[i]))))
    found: dict[int, dict[str, float]] = {}
    for first in range(0, len(order), _BATCH):
        group = order[first : first + _BATCH]
        embedded = embed_prompts(
            model,
            [utterances[i].prompt for i in group],
            [_features(utterances[i]) for i in group],
        )
        scores = answer_log_probs(model, embedded, [of_row[i].ids for i in group], template.end)
        for i, values in zip(group, scores, strict=True):
            found[i] = dict(zip(of_row[i].texts, values, strict=True))
    return [found[i] for i in range(len(utterances))]


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
