"""Decode answers by the language model, by the CTC head, or by both.

Joint decoding (Watanabe et al. 2017, Hori et al. 2017) in its form of two passes: the most probable
answers of CTC's prefix beam search and the language model's own, the greedy one or those of its
beam, are scored by log P_LM(answer, end) + ctc_weight x log P_CTC(answer), and the best one is
chosen. The head knows only what is said in a recording, so other answers are the language model's
alone. So are answers that are drawn: a choice by probability would undo the draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from omni.model.ctc import ctc_log_probs, posteriors
from omni.model.ctc_beam import prefix_beam_search
from omni.model.lm.answer_scores import answer_log_probs
from omni.model.lm.generate import SLOTS, Answer, Finished, Generator, within
from omni.model.lm.gpt_block import rms
from omni.model.lm.hf import HFLanguageModel
from omni.model.lm.prompts import EmbeddedPrompt, embed_prompt
from omni.model.lm.sampling import GREEDY, Sampling
from omni.model.speech_lm import OmniModel

Decoder = Literal["lm", "ctc", "joint"]
_BEAM = 8  # Prefixes of the search, all of which are candidates.
_LABELS_PER_FRAME = 8  # Most probable labels at a soft token that may extend a prefix.
_COMPARED = 16
"""Answers that are compared with those of the CTC head at a time."""
_PATIENCE = 16
"""Steps after which they are, however few."""


class DecodingError(ValueError):
    """A setting of decoding that does not fit the model, or the other settings."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(setting, message)
        self.setting, self.message = setting, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class DecodingOptions:
    """Settings of decoding that replace those of the training; None keeps them."""

    max_new_tokens: int | None = None
    decode: str | None = None
    ctc_weight: float | None = None
    beam: int | None = None
    sampling: Sampling = GREEDY


AS_TRAINED = DecodingOptions()


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding. Raises DecodingError for those that do not fit together."""

    decoder: Decoder = "lm"
    ctc_weight: float = 0.5
    """Weight of log P_CTC beside log P_LM, for the decoder `joint`."""
    max_new_tokens: int | None = None
    """Most tokens of an answer, its end included; None, for models of older versions, whose
    training said nothing about it: see `EmbeddedPrompt.usual_limit`."""
    sampling: Sampling = GREEDY
    """Of all answers but those whose request has its own."""
    beam: int = 1
    """Hypotheses of the language model; more than one: see `omni.model.lm.beam`."""

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise DecodingError("beam", f"expected 1 or more, got {self.beam}")
        if self.beam > 1 and self.decoder == "ctc":
            raise DecodingError(
                "beam",
                "expected the decoder lm or joint: with ctc the language model does not write",
            )
        if not self.sampling.draws_tokens:
            return
        if self.beam > 1:
            raise DecodingError("beam", f"expected 1 with a temperature, got {self.beam}")
        if self.decoder != "lm":
            raise DecodingError(
                "temperature",
                f"expected the decoder lm: {self.decoder} writes the most probable text, and draws "
                "none",
            )

    @classmethod
    def of(
        cls,
        decode: str,
        ctc_weight: float,
        max_new_tokens: int | None,
        *,
        head: bool,
        beam: int = 1,
        sampling: Sampling = GREEDY,
    ) -> Decoding:
        """Resolve `eval.decode`; head: the model has a CTC head.

        Raises DecodingError for a decoder that needs one, and as the class does.
        """
        if decode == "auto":
            decode = "joint" if head else "lm"
        if decode not in ("lm", "ctc", "joint"):
            raise DecodingError("decode", f"expected auto, lm, ctc or joint, got {decode!r}")
        if decode != "lm" and not head:
            needed = f"{decode} needs a CTC head, which optim.ctc_weight trains"
            raise DecodingError("decode", needed)
        return cls(decode, ctc_weight, max_new_tokens, sampling, beam)  # type: ignore[arg-type]

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], options: DecodingOptions = AS_TRAINED, *, head: bool
    ) -> Decoding:
        """Read the settings of a checkpoint's config.yaml, perhaps of an older version.

        options: settings to use instead. With a temperature the decoder is `lm` and the training's
        beam is 1, as it is for the decoder `ctc`, unless they name another one. Raises as `of`.
        """
        values = {"decode": "auto", "ctc_weight": cls.ctc_weight, "max_new_tokens": None}
        drawn: dict[str, Any] = {"decode": "lm"} if options.sampling.draws_tokens else {}
        trained = config.get("eval") or {}
        for given in (trained, drawn, vars(options)):
            values |= {name: given[name] for name in values if given.get(name) is not None}
        beam = options.beam
        if beam is None:
            one = options.sampling.draws_tokens or values["decode"] == "ctc"
            beam = 1 if one else int(trained.get("beam") or 1)
        return cls.of(**values, head=head, beam=beam, sampling=options.sampling)  # type: ignore[arg-type]

    def __str__(self) -> str:
        weight = f", ctc_weight {self.ctc_weight:g}" if self.decoder == "joint" else ""
        beam = f", beam {self.beam}" if self.beam > 1 else ""
        drawn, sampling = "", self.sampling
        if sampling.draws_tokens:
            drawn = (
                f", temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, "
                f"seed {sampling.seed}"
            )
        return f"{self.decoder}{weight}{beam}{drawn}"


@dataclass(frozen=True)
class Choice:
    """An answer, and who decoded it. alone: answers of single decoders that were not chosen."""

    answer: Answer
    decoder: Decoder
    alone: Mapping[Decoder, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """An answer to be decoded.

    prompt: ids, with AUDIO for each recording. features: (T, d) at 50 frames/s of each recording.
    transcription: True where the answer is what is said in the only recording; others are decoded
    by the language model, whatever the decoder. limit: most tokens of this answer, its end
    included; None: `Decoding.max_new_tokens`, which holds where it is less. sampling: None: that of
    the settings. draw: number that the draws depend on beside the seed; None: the key. A drawn
    answer is the language model's, unless the decoder is `ctc`, which writes what is said without
    draws.
    """

    prompt: Sequence[int]
    features: Sequence[Tensor]
    transcription: bool = True
    limit: int | None = None
    sampling: Sampling | None = None
    draw: int | None = None


@dataclass
class _Spoken:
    """An answer that is to be compared with that of the CTC head."""

    key: int
    prompt: EmbeddedPrompt
    limit: int
    by_lm: Finished | None
    decoder: Decoder
    age: int = 0
    """Steps for which it has waited."""


class Engine:
    """Decode answers with continuous batching: requests are added at any time.

    end: the token that ends an answer. slots: answers that are written side by side.
    """

    def __init__(
        self, model: OmniModel, *, end: int, settings: Decoding, slots: int = SLOTS
    ) -> None:
        self._model, self._end, self._settings = model, end, settings
        self._generator = Generator(
            model.lm,
            end,
            slots=slots,
            beam=settings.beam,
            keep=model.ctc_head is not None and settings.decoder == "joint",
        )
        self._limits: dict[int, int] = {}
        self._usual: set[int] = set()
        """Keys of answers whose limit is `EmbeddedPrompt.usual_limit`."""
        self._to_compare: dict[int, Decoder] = {}
        """By key: the decoder whose answer is chosen."""
        self._spoken: list[_Spoken] = []

    @property
    def room(self) -> int:
        """Requests that are worth adding before the next step: as many wait as there are places,
        so that those of similar length are read together."""
        most = 2 * self._generator.slots
        return max(0, most - self._generator.waiting - self._generator.active - len(self._spoken))

    @property
    def free(self) -> int:
        """Requests whose answers can be begun at the next step."""
        by_ctc = sum(spoken.by_lm is None for spoken in self._spoken)
        generator = self._generator
        return max(0, generator.slots - generator.waiting - generator.active - by_ctc)

    @property
    def busy(self) -> bool:
        return bool(self._generator.waiting or self._generator.active or self._spoken)

    def written(self, key: int) -> Sequence[int]:
        """Return the tokens that an answer certainly begins with.

        Empty while another hypothesis, or the answer of the CTC head, may be chosen.
        """
        if self._settings.beam > 1 or self._to_compare.get(key, "lm") != "lm":
            return ()
        return self._generator.written(key)

    @torch.inference_mode()
    def add(self, key: int, request: Request) -> None:
        """Add a request. key: any number, which `step` returns with its answer."""
        settings = self._settings
        prompt = embed_prompt(self._model, request.prompt, request.features)
        most = settings.max_new_tokens
        if most is None and request.limit is None:
            limit = prompt.usual_limit
            self._usual.add(key)
        else:
            limit = min(n for n in (most, request.limit) if n is not None)
        sampling = request.sampling or settings.sampling
        compared = request.transcription and self._model.ctc_head is not None
        if compared and settings.decoder == "ctc":
            self._spoken.append(_Spoken(key, prompt, limit, None, "ctc"))
            return
        if compared:
            self._to_compare[key] = "lm" if sampling.draws_tokens else settings.decoder
        self._limits[key] = limit
        self._generator.add(key, prompt, limit, sampling, request.draw)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Choice]]:
        """Write one token of each answer; return the choices that are complete, by their keys."""
        found: list[tuple[int, Choice]] = []
        for spoken in self._spoken:
            spoken.age += 1
        for finished in self._generator.step():
            limit = self._limits.pop(finished.key)
            if finished.key in self._usual:
                self._usual.remove(finished.key)
                finished = replace(finished, answer=within(finished.answer, limit))
            if finished.key in self._to_compare:
                decoder = self._to_compare.pop(finished.key)
                spoken = _Spoken(finished.key, finished.prompt, limit, finished, decoder)
                self._spoken.append(spoken)
            else:
                found.append((finished.key, Choice(finished.answer, "lm")))
        idle = not self._generator.active and not self._generator.waiting
        oldest = max((spoken.age for spoken in self._spoken), default=0)
        if self._spoken and (idle or len(self._spoken) >= _COMPARED or oldest >= _PATIENCE):
            batch, self._spoken = self._spoken[:_COMPARED], self._spoken[_COMPARED:]
            found += self._compare(batch)
        return found

    def _compare(self, batch: Sequence[_Spoken]) -> list[tuple[int, Choice]]:
        """Choose between the language model's answers and those of the CTC head."""
        settings = self._settings
        found = _decode_spoken(self._model, batch, self._end, settings)
        choices = []
        for spoken, (ctc, best) in zip(batch, found, strict=True):
            alone: dict[Decoder, Answer] = {"ctc": ctc}
            if spoken.by_lm is not None:
                alone["lm"] = spoken.by_lm.answer
            chosen = best if spoken.decoder == "joint" else alone.pop(spoken.decoder)
            assert chosen is not None
            choices.append((spoken.key, Choice(chosen, spoken.decoder, alone)))
        return choices


def decode_stream(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[int, Choice]]:
    """Decode requests, read as there is room for them; yield each answer, when it is complete,
    with the number of its request."""
    numbered, more = enumerate(requests), True
    while more or engine.busy:
        while more and engine.room:
            if (item := next(numbered, None)) is None:
                more = False
            else:
                engine.add(*item)
        yield from engine.step()


def decode(
    model: OmniModel, requests: Sequence[Request], *, end: int, settings: Decoding
) -> list[Choice]:
    """Decode the answer to each request; see `Engine`."""
    engine = Engine(model, end=end, settings=settings)
    found = dict(decode_stream(engine, requests))
    return [found[number] for number in range(len(requests))]


def _decode_spoken(
    model: OmniModel, batch: Sequence[_Spoken], end: int, settings: Decoding
) -> list[tuple[Answer, Answer | None]]:
    """Return the answer of CTC alone, and the joint one where the decoder is `joint`."""
    assert model.ctc_head is not None
    prompts = [spoken.prompt for spoken in batch]
    by_lm = [_by_lm(spoken) for spoken in batch]
    soft = [rms(prompt.soft_NC) for prompt in prompts]
    lengths = [len(part) for part in soft]
    written = {token for answers in by_lm for answer in answers for token in answer.ids}
    found = posteriors(model.ctc_head, torch.cat(soft), model.lm, written, _LABELS_PER_FRAME)
    parts = torch.split(found.log_probs_NK, lengths)
    log_probs = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    tokens = found.tokens_K.tolist()
    beams = prefix_beam_search(log_probs, lengths, beam=_BEAM, labels_per_frame=_LABELS_PER_FRAME)
    alone: list[Answer] = []
    candidates: list[list[Answer]] = []
    for spoken, answers, beam in zip(batch, by_lm, beams, strict=True):
        limit, first = spoken.limit, beam[0].labels
        ids = [tokens[label] for label in first[:limit]]
        alone.append(Answer(ids, len(first) >= limit, beam[0].log_prob))
        if settings.decoder != "joint":
            continue
        most = min(limit - 1, _positions(model) - len(spoken.prompt.x_TC))
        others = [
            Answer([tokens[label] for label in hypothesis.labels], False)
            for hypothesis in beam
            if len(hypothesis.labels) <= most
        ]
        known = [answer.ids for answer in answers]
        candidates.append([*answers, *(other for other in others if other.ids not in known)])
    if settings.decoder != "joint":
        return [(answer, None) for answer in alone]
    classes = {token: label for label, token in enumerate(tokens)}
    ids_of = [[answer.ids for answer in of_row] for of_row in candidates]
    labels_of = [[[classes[token] for token in ids] for ids in of_row] for of_row in ids_of]
    held = [spoken.by_lm.held for spoken in batch if spoken.by_lm is not None]
    lm_scores = answer_log_probs(model, [row for row in held if row is not None], ids_of, end)
    ctc_scores = ctc_log_probs(log_probs, lengths, labels_of)
    chosen: list[tuple[Answer, Answer | None]] = []
    for ctc_alone, of_row, lm, ctc in zip(alone, candidates, lm_scores, ctc_scores, strict=True):
        scores = [a + settings.ctc_weight * b for a, b in zip(lm, ctc, strict=True)]
        best = max(range(len(of_row)), key=scores.__getitem__)
        chosen.append((ctc_alone, replace(of_row[best], log_prob=lm[best])))
    return chosen


def _by_lm(spoken: _Spoken) -> list[Answer]:
    """Return the language model's answer, and those of its beam that were written to their end."""
    if spoken.by_lm is None:
        return []
    return [spoken.by_lm.answer, *(other for other in spoken.by_lm.others if not other.cut)]


def _positions(model: OmniModel) -> float:
    """Return the positions that the language model can number; unlimited for most."""
    learnt = model.lm.learnt_positions() if isinstance(model.lm, HFLanguageModel) else None
    return float("inf") if learnt is None else learnt
