"""Decoding by the language model, by CTC and by both, against the formula by brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.model.chat_template import AUDIO
from omni.model.ctc import ctc_log_probs, posteriors
from omni.model.decode import Choice, Decoding, DecodingError, DecodingOptions, Request, decode
from omni.model.lm.answer_scores import answer_log_probs
from omni.model.lm.generate import continue_prompts
from omni.model.lm.gpt_block import rms
from omni.model.lm.prompts import EmbeddedPrompt, embed_prompt
from omni.model.lm.sampling import Sampling
from omni.model.packed_attention import SegmentLayout
from omni.model.speech_lm import OmniConfig, OmniModel
from tests.helpers.hf_folders import wrapped
from tests.helpers.small_gpt import SMALL, awaken

BOS, END, LIMIT = 90, 7, 12
LENGTHS = [30, 250, 77, 9, 520]  # frames; 520 make 130 soft tokens, over the windows of SMALL
PROMPTS = [[AUDIO, BOS], [3, AUDIO, BOS], [AUDIO, BOS, 5, 6], [AUDIO, BOS], [AUDIO, BOS]]


def gpt() -> OmniModel:
    model = OmniModel(OmniConfig(SMALL, feature_dim=8, ctc=True)).eval()
    awaken(model, seed=2)
    assert model.ctc_head is not None
    with torch.no_grad():
        model.ctc_head.weight.mul_(4.0)  # Sure of itself, so that its beam holds short answers.
        model.ctc_head.bias[-1] = 6.0
    return model


def llama(kind: str = "mistral") -> OmniModel:
    """With a sliding window of six positions, and the CTC head of a transformers model."""
    lm = wrapped(kind)
    model = OmniModel(OmniConfig(lm.config, feature_dim=8, projector="mlp", ctc=True), lm).eval()
    awaken(model.projector)
    return model


@pytest.fixture(scope="module", params=[gpt, llama])
def model(request: pytest.FixtureRequest) -> OmniModel:
    return request.param()


@pytest.fixture(scope="module")
def features() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(length, 8, generator=generator)] for length in LENGTHS]


def run(
    model: OmniModel, features: list[list[Tensor]], decoder: Any, *rows: int, **settings: Any
) -> list[Choice]:
    chosen = rows or range(len(features))
    given = Decoding(decoder, **{"max_new_tokens": LIMIT, **settings})
    requests = [Request(PROMPTS[i], features[i], i != 1) for i in chosen]
    return decode(model, requests, end=END, settings=given)


@torch.inference_mode()
def embed_prompts(
    model: OmniModel, prompts: list[list[int]], features: list[list[Tensor]]
) -> list[EmbeddedPrompt]:
    return [embed_prompt(model, p, f) for p, f in zip(prompts, features, strict=True)]


@torch.inference_mode()
def lm_log_prob(model: OmniModel, x_TC: Tensor, ids_T: Tensor, answer: list[int]) -> float:
    """One answer by a forward pass of its own."""
    ids = torch.cat((ids_T, torch.tensor(answer, dtype=torch.long)))
    x = torch.cat((x_TC, model.lm.embed(torch.tensor([answer], dtype=torch.long))[0]))
    layout = SegmentLayout.packed(torch.ones(1, len(ids), dtype=torch.long))
    hidden = model.lm.trunk(x[None], ids.clamp(min=0)[None], layout, (ids != AUDIO)[None])
    logits = model.lm.logits(hidden[0, len(x_TC) - 1 :])
    return -float(F.cross_entropy(logits, torch.tensor([*answer, END]), reduction="sum"))


@torch.inference_mode()
def ctc_log_prob(model: OmniModel, soft_NC: Tensor, answer: list[int]) -> float:
    assert model.ctc_head is not None
    log_probs = model.ctc_head(rms(soft_NC), model.lm).float().log_softmax(-1)
    target = torch.tensor([answer], dtype=torch.long).view(1, -1)
    blank = log_probs.shape[-1] - 1
    loss = F.ctc_loss(
        log_probs[:, None], target, [len(log_probs)], [len(answer)], blank, reduction="sum"
    )
    return -float(loss)


def test_answers_that_share_beginnings_are_scored_as_each_alone(
    model: OmniModel, features: list[list[Tensor]]
) -> None:
    prompts = embed_prompts(model, PROMPTS, features)
    answers = [
        [[1, 2, 3], [1, 2], [1, 2, 3, 4], []],
        [[5]],
        [[9, 9, 9, 9, 9, 9, 9, 9], [9, 8], [8, 9, 9]],
        [[], [2]],
        [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [2]],
    ]
    for limit in (1, LIMIT):  # Of the answers, nothing or a part is among the keys and values.
        held = continue_prompts(model.lm, prompts, END, [limit] * len(prompts), keep=True)
        for of_prompt, one in zip(answers, held, strict=True):
            of_prompt.append([*one.answer.ids, 3])
        rows = [one.held for one in held if one.held is not None]
        check_scores(model, prompts, answers, answer_log_probs(model, rows, answers, END))


def check_scores(
    model: OmniModel,
    prompts: list[EmbeddedPrompt],
    answers: list[list[list[int]]],
    found: list[list[float]],
) -> None:
    for prompt, of_prompt, scores in zip(prompts, answers, found, strict=True):
        expected = [lm_log_prob(model, prompt.x_TC, prompt.ids_T, a) for a in of_prompt]
        assert scores == pytest.approx(expected, abs=2e-4)


def test_ctc_scores_a_large_vocabulary_as_a_small_one(
    model: OmniModel, features: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    soft = [rms(p.soft_NC) for p in embed_prompts(model, PROMPTS, features)]
    lengths, answers = [len(part) for part in soft], [[[4, 4], [1]], [[]], [[3]], [[2]], [[5, 6]]]
    assert model.ctc_head is not None
    with torch.inference_mode():
        for limit in (None, 10):
            if limit is not None:
                monkeypatch.setattr("omni.model.ctc._FULL_SOFTMAX_CLASSES", limit)
                monkeypatch.setattr("omni.model.ctc.LOGITS_PER_CHUNK", 3000)
            found = posteriors(model.ctc_head, torch.cat(soft), model.lm, range(7), 3)
            parts = torch.split(found.log_probs_NK, lengths)
            padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            places = {token: n for n, token in enumerate(found.tokens_K.tolist())}
            labels = [[[places[t] for t in answer] for answer in row] for row in answers]
            scores = ctc_log_probs(padded, lengths, labels)
            expected = [
                [ctc_log_prob(model, p.soft_NC, answer) for answer in row]
                for p, row in zip(embed_prompts(model, PROMPTS, features), answers, strict=True)
            ]
            for row, wanted in zip(scores, expected, strict=True):
                assert row == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    assert len(found.tokens_K) < model.ctc_head.classes - 1


@pytest.mark.parametrize("weight", [0.05, 0.5, 5.0])
def test_the_joint_answer_has_the_best_sum_of_both(
    model: OmniModel, features: list[list[Tensor]], weight: float
) -> None:
    choices = run(model, features, "joint", ctc_weight=weight)
    prompts = embed_prompts(model, PROMPTS, features)
    for n, (choice, prompt) in enumerate(zip(choices, prompts, strict=True)):
        if n == 1:
            continue

        def total(answer: list[int], prompt: Any = prompt) -> float:
            lm = lm_log_prob(model, prompt.x_TC, prompt.ids_T, answer)
            return lm + weight * ctc_log_prob(model, prompt.soft_NC, answer)

        best = total(choice.answer.ids)
        for other in choice.alone.values():
            if not (other.cut and other is choice.alone["ctc"]):
                assert best >= total(other.ids) - 1e-3


def test_each_decoder_says_who_wrote_an_answer(
    model: OmniModel, features: list[list[Tensor]]
) -> None:
    lm, ctc, joint = (run(model, features, decoder) for decoder in ("lm", "ctc", "joint"))
    for n in range(len(LENGTHS)):
        # The second answer is not what is said: the language model writes it in any case.
        expected = ["lm"] * 3 if n == 1 else ["lm", "ctc", "joint"]
        assert [choices[n].decoder for choices in (lm, ctc, joint)] == expected
        assert joint[n].alone == ({} if n == 1 else {"lm": lm[n].answer, "ctc": ctc[n].answer})
        assert lm[n].alone == ({} if n == 1 else {"ctc": ctc[n].answer})
    assert ctc[1] == joint[1] == lm[1]
    assert len({tuple(choices[0].answer.ids) for choices in (lm, ctc)}) == 2
    assert all(len(choice.answer.ids) <= LIMIT for choice in [*lm, *ctc, *joint])


@pytest.mark.parametrize(("decoder", "beam"), [("lm", 1), ("ctc", 1), ("joint", 1), ("joint", 3)])
def test_an_answer_does_not_depend_on_its_batch(
    model: OmniModel, features: list[list[Tensor]], decoder: str, beam: int
) -> None:
    together = run(model, features, decoder, beam=beam)
    alone = [run(model, features, decoder, n, beam=beam)[0] for n in range(len(LENGTHS))]
    assert together == alone
    assert run(model, features, decoder, 4, 0, 3, beam=beam) == [together[n] for n in (4, 0, 3)]


def test_the_joint_answer_is_chosen_among_all_answers_of_a_beam(
    model: OmniModel, features: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, limits = embed_prompts(model, PROMPTS, features), [LIMIT] * len(PROMPTS)
    # An end that answers reach: a token that they often go on with.
    endless = continue_prompts(model.lm, prompts, -5, limits, beam=4)
    later = Counter(t for one in endless for h in one.others for t in {*h.ids[1:]})
    monkeypatch.setitem(globals(), "END", later.most_common(1)[0][0])
    beams = continue_prompts(model.lm, prompts, END, limits, beam=4)
    joint = run(model, features, "joint", beam=4)
    compared = 0
    for n in (0, 2, 3, 4):
        assert joint[n].alone["lm"] == beams[n].answer
        every = (beams[n].answer, *beams[n].others)
        scores = [h.log_prob / (len(h.ids) + (not h.cut)) for h in every]
        assert scores == sorted(scores, reverse=True)

        def total(answer: list[int], prompt: Any = prompts[n]) -> float:
            lm = lm_log_prob(model, prompt.x_TC, prompt.ids_T, answer)
            return lm + 0.5 * ctc_log_prob(model, prompt.soft_NC, answer)

        best = total(joint[n].answer.ids)
        for other in (other for other in beams[n].others if not other.cut):
            assert best >= total(other.ids) - 1e-3
            compared += 1
    assert compared


def test_a_drawn_answer_is_the_language_models_beside_joint_ones(
    model: OmniModel, features: list[list[Tensor]]
) -> None:
    drawn = Sampling(1.5, seed=3)
    requests = [Request(PROMPTS[i], features[i], i != 1) for i in range(len(PROMPTS))]
    mixed = list(requests)
    mixed[2] = replace(mixed[2], sampling=drawn, draw=7)
    settings = Decoding("joint", max_new_tokens=LIMIT)
    joint = decode(model, requests, end=END, settings=settings)
    found = decode(model, mixed, end=END, settings=settings)
    assert [found[n] for n in (0, 1, 3, 4)] == [joint[n] for n in (0, 1, 3, 4)]
    only_lm = Decoding("lm", max_new_tokens=LIMIT)
    [alone] = decode(model, [mixed[2]], end=END, settings=only_lm)
    assert found[2] == alone and alone.decoder == "lm"
    assert alone.answer.ids != joint[2].alone["lm"].ids
    [other] = decode(model, [replace(mixed[2], draw=8)], end=END, settings=only_lm)
    assert other.answer.ids != alone.answer.ids


@pytest.mark.parametrize(
    ("options", "decoder", "setting"),
    [
        (DecodingOptions(beam=4), "joint", None),
        (DecodingOptions(beam=4, decode="lm"), "lm", None),
        (DecodingOptions(sampling=Sampling(0.5)), "lm", None),
        (DecodingOptions(beam=4, decode="ctc"), "", "beam"),
        (DecodingOptions(beam=4, sampling=Sampling(0.5)), "", "beam"),
        (DecodingOptions(beam=0), "", "beam"),
        (DecodingOptions(decode="joint", sampling=Sampling(0.5)), "", "temperature"),
        (DecodingOptions(decode="ctc", sampling=Sampling(0.5)), "", "temperature"),
        (DecodingOptions(decode="both"), "", "decode"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(
    options: DecodingOptions, decoder: str, setting: str | None
) -> None:
    saved = {"eval": {"decode": "joint"}}
    if setting is None:
        found = Decoding.of_config(saved, options, head=True)
        assert (found.decoder, found.beam) == (decoder, options.beam or 1)
        assert found.sampling == options.sampling
        return
    with pytest.raises(DecodingError) as refused:
        Decoding.of_config(saved, options, head=True)
    assert refused.value.setting == setting


def test_a_model_with_learnt_positions_is_scored_within_them() -> None:
    model = llama("gpt2")
    generator = torch.Generator().manual_seed(0)
    # 500 soft tokens and the prompt leave ten positions of 512.
    feature = torch.randn(2000, 8, generator=generator)
    [choice] = decode(
        model,
        [Request([AUDIO, BOS, 5], [feature])],
        end=END,
        settings=Decoding("joint", max_new_tokens=40),
    )
    assert choice.decoder == "joint" and len(choice.answer.ids) <= 10


@pytest.mark.parametrize(
    ("given", "head", "expected"),
    [("auto", True, "joint"), ("auto", False, "lm"), ("lm", True, "lm"), ("ctc", True, "ctc")],
)
def test_auto_is_joint_where_there_is_a_head(given: str, head: bool, expected: str) -> None:
    assert Decoding.of(given, 0.5, None, head=head).decoder == expected


@pytest.mark.parametrize("given", ["ctc", "joint"])
def test_a_decoder_without_its_head_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=f"{given} needs a CTC head"):
        Decoding.of(given, 0.5, None, head=False)


def test_a_config_of_an_older_version_has_the_defaults() -> None:
    assert Decoding.of_config({}, head=True) == Decoding("joint")
    assert Decoding.of_config({"eval": {"max_new_tokens": 9}}, head=False) == Decoding(
        "lm", max_new_tokens=9
    )
    saved = {"eval": {"decode": "joint", "ctc_weight": 0.25}}
    assert Decoding.of_config(saved, head=True) == Decoding("joint", 0.25)
    assert Decoding.of_config(saved, DecodingOptions(decode="ctc"), head=True).decoder == "ctc"


@pytest.mark.parametrize(
    ("options", "beam"),
    [
        (DecodingOptions(), 4),
        (DecodingOptions(decode="lm"), 4),
        (DecodingOptions(beam=2), 2),
        (DecodingOptions(beam=1), 1),
        (DecodingOptions(decode="ctc"), 1),
        (DecodingOptions(sampling=Sampling(0.5)), 1),
    ],
)
def test_the_beam_is_that_of_the_training_where_one_can_be(
    options: DecodingOptions, beam: int
) -> None:
    saved = {"eval": {"decode": "joint", "beam": 4}}
    assert Decoding.of_config(saved, options, head=True).beam == beam
