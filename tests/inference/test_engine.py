"""The decoding engine: continuous batching, beams and sampling, against one answer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omni.checkpoint.base import checkpoint_folder
from omni.corpus.index import build_index
from omni.inference.rows import pieces_of, transcribe_rows
from omni.inference.transcriber import Transcriber, Transcript
from omni.model.chat_template import AUDIO
from omni.model.decode import Decoding, Engine, Request, decode, decode_stream
from omni.model.lm.generate import Generator, continue_prompts
from omni.model.lm.prompts import EmbeddedPrompt, embed_prompt
from omni.model.lm.sampling import GREEDY, Sampling, choose
from omni.model.speech_lm import OmniConfig, OmniModel
from tests.helpers.hf_folders import random_model, wrapped
from tests.helpers.small_gpt import SMALL, awaken

BOS, END = 90, 7


def gpt() -> OmniModel:
    model = OmniModel(OmniConfig(SMALL, feature_dim=8, ctc=True)).eval()
    awaken(model, seed=2)
    return model


def llama() -> OmniModel:
    lm = wrapped("mistral", initializer_range=0.3)
    model = OmniModel(OmniConfig(lm.config, feature_dim=8, ctc=True), lm).eval()
    awaken(model.projector)
    return model


def requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 240, (count,), generator=generator).tolist()
    limits = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [
        Request([AUDIO, BOS], [torch.randn(n, 8, generator=generator)], number % 5 > 0, limit)
        for number, (n, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def likely_end(model: OmniModel) -> int:
    """A token that ends some answers and not others, were it the end."""
    answers = decode(model, requests(20), end=-5, settings=Decoding("lm", max_new_tokens=20))
    later = [{*choice.answer.ids[3:]} for choice in answers]
    first = {choice.answer.ids[0] for choice in answers}
    return max({*range(90)} - first, key=lambda token: sum(token in ids for ids in later))


@pytest.mark.parametrize("count", [32, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "decoder"), [(gpt, "lm"), (gpt, "joint"), (llama, "joint")])
def test_answers_that_take_each_others_places_equal_those_alone(
    make: Callable[[], OmniModel], decoder: Any, count: int
) -> None:
    model = make()
    given, end = requests(count), likely_end(model)
    settings = Decoding(decoder, max_new_tokens=24)
    engine = Engine(model, end=end, settings=settings, slots=8)
    together = dict(decode_stream(engine, iter(given)))
    assert not engine.busy and len(together) == count
    by_lm = [choice.alone.get("lm", choice.answer) for choice in together.values()]
    assert sum(answer.cut for answer in by_lm) not in (0, count)
    for number, request in enumerate(given):
        [alone] = decode(model, [request], end=end, settings=settings)
        assert together[number] == alone
        assert together[number].answer.log_prob == pytest.approx(alone.answer.log_prob, abs=1e-3)
        limit = min(24, request.limit or 24)
        assert len(alone.answer.ids) <= limit


@pytest.mark.parametrize(("make", "decoder"), [(gpt, "lm"), (llama, "joint")])
def test_beams_that_begin_beside_others_equal_those_alone(
    make: Callable[[], OmniModel], decoder: Any
) -> None:
    model = make()
    given, end = requests(10), likely_end(model)
    settings = Decoding(decoder, max_new_tokens=12, beam=3)
    engine = Engine(model, end=end, settings=settings, slots=12)
    found: dict[int, Any] = {}
    for number, request in enumerate(given):
        engine.add(number, request)
        if number % 3 == 0:  # Places are added while others are in use.
            found |= dict(engine.step())
    while engine.busy:
        found |= dict(engine.step())
    for number, request in enumerate(given):
        [alone] = decode(model, [request], end=end, settings=settings)
        assert found[number] == alone


def test_an_answer_begins_while_others_are_written() -> None:
    model = gpt()
    generator = Generator(model.lm, 999, slots=3)
    with torch.inference_mode():
        prompts = [embed_prompt(model, r.prompt, r.features) for r in requests(8)]
    for key, prompt in enumerate(prompts):
        generator.add(key, prompt, 4 if key == 0 else 9)
    most, order = 0, []
    while generator.active or generator.waiting:
        order += [finished.key for finished in generator.step()]
        most = max(most, generator.active)
    assert most == 3 and sorted(order) == list(range(8))
    alone = [continue_prompts(model.lm, [p], 999, [9])[0].answer.ids for p in prompts[1:]]
    again = continue_prompts(model.lm, prompts[1:], 999, [9] * 7, slots=3)
    assert [finished.answer.ids for finished in again] == alone


@torch.inference_mode()
def prompts_of(lm: object, ids: Tensor) -> list[EmbeddedPrompt]:
    return [
        EmbeddedPrompt(lm.embed(row[None])[0], row, lm.embed(row[None])[0][:0], 0.0) for row in ids
    ]  # type: ignore[attr-defined]


def test_a_beam_finds_what_transformers_finds() -> None:
    lm, alone = (
        wrapped("llama", initializer_range=0.3),
        random_model("llama", initializer_range=0.3),
    )
    ids = torch.randint(3, 300, (6, 9), generator=torch.Generator().manual_seed(1))
    end = int(alone(input_ids=ids[:1]).logits[0, -1].topk(3).indices[2])
    wanted = alone.generate(
        ids, num_beams=4, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=end
    )[:, 9:].tolist()
    wanted = [row[: row.index(end)] if end in row else row for row in wanted]
    found = continue_prompts(lm, prompts_of(lm, ids), end, [8] * 6, beam=4, slots=8)
    assert [finished.answer.ids for finished in found] == wanted
    greedy = continue_prompts(lm, prompts_of(lm, ids), end, [8] * 6)
    assert [g.answer.ids for g in greedy] != wanted


def test_drawn_answers_follow_the_seed_and_not_the_batch() -> None:
    model, given = gpt(), requests(12)
    sampled = Decoding("lm", max_new_tokens=12, sampling=Sampling(0.8, 0.9, seed=3))
    first = decode(model, given, end=END, settings=sampled)
    engine = Engine(model, end=END, settings=sampled, slots=2)
    again = dict(decode_stream(engine, iter(given)))
    assert first == [again[number] for number in range(12)]
    other = dataclasses.replace(sampled, sampling=Sampling(0.8, 0.9, seed=4))
    assert decode(model, given, end=END, settings=other) != first
    narrow = dataclasses.replace(sampled, sampling=Sampling(0.8, 1e-6, seed=3))
    greedy = dataclasses.replace(sampled, sampling=Sampling())
    assert decode(model, given, end=END, settings=narrow) == decode(
        model, given, end=END, settings=greedy
    )


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, -float("inf")])
    rows, heat = 4000, 0.7
    settings = [
        Sampling(heat, 0.9, seed=1),
        Sampling(heat, seed=1),
        GREEDY,
        Sampling(1e-30, seed=1),
    ]
    wanted = (logits / heat).softmax(-1)
    nucleus = torch.where(wanted >= wanted.topk(2).values[1], wanted, torch.zeros(()))
    for sampling, expected in zip(
        settings, [nucleus / nucleus.sum(), wanted, *[torch.eye(5)[1]] * 2], strict=True
    ):
        draws = [sampling.draws(n) for n in range(rows)]
        ids, log_probs = choose(logits.expand(rows, -1), [sampling] * rows, draws)
        shares = torch.bincount(ids, minlength=5) / rows
        assert (shares - expected).abs().max() < 0.03
        torch.testing.assert_close(log_probs, logits.log_softmax(-1)[ids])


def test_rows_with_settings_of_their_own_are_chosen_side_by_side() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    of_row = [Sampling(2.0, 0.9, seed=4), GREEDY, Sampling(0.5, seed=5)]
    together, _ = choose(logits, of_row, [s.draws(n) for n, s in enumerate(of_row)])
    alone = [choose(logits[n : n + 1], [s], [s.draws(n)])[0] for n, s in enumerate(of_row)]
    assert together.tolist() == [int(ids) for ids in alone]
    assert together[1] == logits[1].argmax()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.slow
def test_200_real_utterances_are_written_as_one_by_one() -> None:
    tiny = Transcriber.load(checkpoint_folder("omni-tiny"))
    table = build_index(["embedded:train"], prompt=tiny.prompt).table.slice(0, 200)
    together = [found for _, found in transcribe_rows(tiny, table)]
    for row, found in zip(table.to_pylist(), together, strict=True):
        request = tiny.request("", [piece for [piece] in pieces_of(tiny, row)])
        [alone] = tiny.answers([request])
        assert isinstance(found, Transcript) and found == alone
