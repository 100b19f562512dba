"""Score the choices of closed tasks by their likelihood, with the true and with other audio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omni.model.chat_template import Template, transcription
from omni.model.lm.gpt import scatter_soft_tokens
from omni.model.speech_lm import OmniModel
from omni.plan.sequences import sequence_positions
from omni.storage.digest import digest
from omni.stream.collate import Utterance, collate

_POSITIONS = 16_384
"""Most positions of a forward pass; one utterance may have more."""


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
    another one is not favoured by being its prefix.
    """
    known = {texts: answers_of(texts, template) for texts in dict.fromkeys(map(tuple, choices))}
    rows = [
        [_answered(utterance, answer) for answer in known[tuple(texts)]]
        for utterance, texts in zip(utterances, choices, strict=True)
    ]
    lengths = [sum(_positions(model, segment) for segment in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    found: dict[int, list[float]] = {}
    while order:
        group = [order.pop()]  # the longest, whose length is that of the rows
        width = lengths[group[0]]
        while order and (len(group) + 1) * width <= _POSITIONS:
            group.append(order.pop())
        scored = _log_probs(model, [rows[i] for i in group], width)
        found |= dict(zip(group, scored, strict=True))
    return [dict(zip(texts, found[i], strict=True)) for i, texts in enumerate(map(tuple, choices))]


def _answered(utterance: Utterance, answer: Sequence[int]) -> Utterance:
    """Put a choice in the place of the answer of an utterance."""
    given = list(utterance.prompt)
    flags = [False] * len(given) + [True] * len(answer)
    return replace(utterance, ids=[*given, *answer], supervised=flags, task=0)


def _positions(model: OmniModel, utterance: Utterance) -> int:
    frames = [len(part) for part in _features(utterance)]
    config = model.config
    return sequence_positions(frames, len(utterance.ids), config.stack, config.summary_tokens)


def _log_probs(
    model: OmniModel, rows: Sequence[Sequence[Utterance]], positions: int
) -> list[list[float]]:
    """Compute the log-probability of each answer of packed rows."""
    config = model.config
    batch = collate(
        rows,
        positions=positions,
        stack=config.stack,
        frame_dim=config.frame_dim,
        summary_tokens=config.summary_tokens,
    ).to(next(model.projector.parameters()).device)
    x = model.lm.embed(batch.tokens_BT)
    soft_NC = model.project(batch.audio_NF, batch.audio_starts_N)
    x = scatter_soft_tokens(x, soft_NC, batch.audio_at_N)
    if model.summary is not None:
        x = scatter_soft_tokens(x, model.summaries(batch), batch.summary_at_M)
    hidden = model.lm.trunk(x, batch.tokens_BT, batch.layout(), ~batch.audio_mask_BT)
    hidden_SC, targets = (
        of.flatten(0, 1).index_select(0, batch.supervised_S) for of in (hidden, batch.targets_BT)
    )
    losses: Tensor
    losses, _ = model.lm.loss(hidden_SC, targets)
    counts = [sum(segment.supervised) for row in rows for segment in row]
    sums = iter([-float(part.sum()) for part in torch.split(losses.float().cpu(), counts)])
    return [[next(sums) for _ in row] for row in rows]


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
