"""Decode answers by the language model, by the CTC head, or by both.

Joint decoding (Watanabe et al. 2017, Hori et al. 2017) in its form of two passes: the most probable
answers of CTC's prefix beam search and the greedy answer of the language model are scored by
log P_LM(answer, end) + ctc_weight x log P_CTC(answer), and the best one is chosen. The head knows
only what is said in a recording, so other answers are the language model's alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from omni.model.ctc import ctc_log_probs, posteriors
from omni.model.ctc_beam import prefix_beam_search
from omni.model.lm.answer_scores import answer_log_probs
from omni.model.lm.generate import (
    Answer,
    EmbeddedPrompt,
    answer_limit,
    continue_prompts,
    embed_prompts,
)
from omni.model.lm.gpt_block import rms
from omni.model.lm.hf import HFLanguageModel
from omni.model.speech_lm import OmniModel

Decoder = Literal["lm", "ctc", "joint"]
_BEAM = 8  # Prefixes of the search, all of which are candidates.
_LABELS_PER_FRAME = 8  # Most probable labels at a soft token that may extend a prefix.


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding."""

    decoder: Decoder = "lm"
    ctc_weight: float = 0.5
    """Weight of log P_CTC beside log P_LM, for the decoder `joint`."""
    max_new_tokens: int | None = None
    """Most tokens of an answer, see `generate`."""

    @classmethod
    def of(
        cls, decode: str, ctc_weight: float, max_new_tokens: int | None, *, head: bool
    ) -> Decoding:
        """Resolve `eval.decode`; head: the model has a CTC head.

        Raises ValueError for a decoder that needs one.
        """
        if decode == "auto":
            decode = "joint" if head else "lm"
        if decode not in ("lm", "ctc", "joint"):
            raise ValueError(f"expected auto, lm, ctc or joint, got {decode!r}")
        if decode != "lm" and not head:
            raise ValueError(f"{decode} needs a CTC head, which optim.ctc_weight trains")
        return cls(decode, ctc_weight, max_new_tokens)  # type: ignore[arg-type]

    @classmethod
    def of_config(cls, config: Mapping[str, Any], *, head: bool, **changes: Any) -> Decoding:
        """Read the settings of a checkpoint's config.yaml, perhaps of an older version.

        changes: values to use instead, where they are not None. Raises as `of`.
        """
        values = {"decode": "auto", "ctc_weight": cls.ctc_weight, "max_new_tokens": None}
        for given in (config.get("eval") or {}, changes):
            values |= {name: given[name] for name in values if given.get(name) is not None}
        return cls.of(**values, head=head)  # type: ignore[arg-type]

    def __str__(self) -> str:
        weight = f", ctc_weight {self.ctc_weight:g}" if self.decoder == "joint" else ""
        return f"{self.decoder}{weight}"


@dataclass(frozen=True)
class Choice:
    """An answer, and who decoded it. alone: answers of single decoders that were not chosen."""

    answer: Answer
    decoder: Decoder
    alone: Mapping[Decoder, Answer] = field(default_factory=dict)


@torch.inference_mode()
def decode(
    model: OmniModel,
    prompts: Sequence[Sequence[int]],
    features: Sequence[Sequence[Tensor]],
    transcriptions: Sequence[bool],
    *,
    end: int,
    settings: Decoding,
) -> list[Choice]:
    """Decode the answer to each prompt.

    prompts, features, end: see `generate`. transcriptions: True where the answer is what is said in
    the only recording; the others are decoded by the language model, whatever the decoder.
    """
    embedded = embed_prompts(model, prompts, features)
    every = range(len(embedded))
    spoken = [i for i in every if transcriptions[i] and model.ctc_head is not None]
    written = [i for i in every if i not in {*spoken}] if settings.decoder == "ctc" else [*every]
    limit = settings.max_new_tokens
    answers = continue_prompts(model, [embedded[i] for i in written], end, limit)
    by_lm = dict(zip(written, answers, strict=True))
    by_ctc, joint = _decode_spoken(
        model, [embedded[i] for i in spoken], [by_lm.get(i) for i in spoken], end, settings
    )
    choices = {i: Choice(answer, "lm") for i, answer in by_lm.items()}
    for i, ctc, best in zip(spoken, by_ctc, joint, strict=True):
        alone: dict[Decoder, Answer] = {"ctc": ctc}
        if i in by_lm:
            alone["lm"] = by_lm[i]
        chosen = best if settings.decoder == "joint" else alone.pop(settings.decoder)
        assert chosen is not None
        choices[i] = Choice(chosen, settings.decoder, alone)
    return [choices[i] for i in every]


def _decode_spoken(
    model: OmniModel,
    prompts: Sequence[EmbeddedPrompt],
    by_lm: Sequence[Answer | None],
    end: int,
    settings: Decoding,
) -> tuple[list[Answer], list[Answer | None]]:
    """Return the answers of CTC alone, and the joint ones where the decoder is `joint`."""
    if not prompts:
        return [], []
    assert model.ctc_head is not None
    soft = [rms(prompt.soft_NC) for prompt in prompts]
    lengths = [len(part) for part in soft]
    written = {token for answer in by_lm if answer is not None for token in answer.ids}
    found = posteriors(model.ctc_head, torch.cat(soft), model.lm, written, _LABELS_PER_FRAME)
    parts = torch.split(found.log_probs_NK, lengths)
    log_probs = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    tokens = found.tokens_K.tolist()
    beams = [
        [hypothesis.labels for hypothesis in beam]
        for beam in prefix_beam_search(
            log_probs, lengths, beam=_BEAM, labels_per_frame=_LABELS_PER_FRAME
        )
    ]
    limits = [answer_limit(prompt, settings.max_new_tokens) for prompt in prompts]
    alone = [
        Answer([tokens[label] for label in beam[0][:limit]], len(beam[0]) >= limit)
        for beam, limit in zip(beams, limits, strict=True)
    ]
    if settings.decoder != "joint":
        return alone, [None] * len(alone)
    classes = {token: label for label, token in enumerate(tokens)}
    candidates: list[list[Answer]] = []
    for prompt, beam, limit, answer in zip(prompts, beams, limits, by_lm, strict=True):
        assert answer is not None
        most = min(limit - 1, _positions(model) - len(prompt.x_TC))
        ids = [[tokens[label] for label in labels] for labels in beam if len(labels) <= most]
        others = [Answer(labels, False) for labels in ids if labels != answer.ids]
        candidates.append([answer, *others])
    ids_of = [[answer.ids for answer in of_row] for of_row in candidates]
    labels_of = [[[classes[token] for token in ids] for ids in of_row] for of_row in ids_of]
    lm_scores = answer_log_probs(model, prompts, ids_of, end)
    ctc_scores = ctc_log_probs(log_probs, lengths, labels_of)
    chosen: list[Answer | None] = []
    for of_row, lm, ctc in zip(candidates, lm_scores, ctc_scores, strict=True):
        scores = [a + settings.ctc_weight * b for a, b in zip(lm, ctc, strict=True)]
        chosen.append(of_row[max(range(len(of_row)), key=scores.__getitem__)])
    return alone, chosen


def _positions(model: OmniModel) -> float:
    """Return the positions that the language model can number; unlimited for most."""
    learnt = model.lm.learnt_positions() if isinstance(model.lm, HFLanguageModel) else None
    return float("inf") if learnt is None else learnt
