"""The speech language model: sums that add up over any split, and every part doing its share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omni.model.batch import IGNORED, Batch
from omni.model.chat_template import AUDIO
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.packed_attention import SegmentLayout
from omni.model.projector import stack_frames
from omni.model.speech_lm import LossSums, OmniConfig, OmniModel
from omni.stream.collate import Utterance, collate
from tests.helpers.hf_folders import wrapped
from tests.helpers.small_gpt import SMALL, awaken
from tests.helpers.utterances import spoken

BOS, END = 90, 94
CONFIG = OmniConfig(SMALL, feature_dim=384, ctc=True)
TEXTS = [[5, 6, 7], [8, 8, 9, 10], [11], [12, 13, 14, 15, 16]]
PROMPTS = [[], [20, 21], [], [22]]


@pytest.fixture(scope="module")
def utterances(trim: WhisperEncoder, clips: list[np.ndarray]) -> list[Utterance]:
    """Four real recordings with arbitrary transcripts."""
    return [
        spoken(features, prompt, text, bos=BOS, end=END)
        for features, prompt, text in zip(trim.encode(clips[:4]), PROMPTS, TEXTS, strict=True)
    ]


def lay_out(*bins: Sequence[Utterance], positions: int = 160) -> Batch:
    return collate(bins, positions=positions, stack=4, frame_dim=384, ctc=True)


def awake(config: OmniConfig = CONFIG, seed: int = 0) -> OmniModel:
    model = OmniModel(config).eval()
    awaken(model, seed)
    return model


def assert_adds_up(whole: LossSums, parts: Sequence[LossSums]) -> None:
    for name in ("loss", "tokens", "correct", "ctc"):
        total = sum(float(getattr(part, name)) for part in parts)
        assert float(getattr(whole, name)) == pytest.approx(total, rel=1e-4), name


# --- the loss ------------------------------------------------------------------------------------


@torch.inference_mode()
def test_sums_add_up_over_any_split_into_batches(utterances: list[Utterance]) -> None:
    model = awake()
    a, b, c, d = utterances
    whole = model(lay_out([a, b, c, d]))
    assert int(whole.tokens) == sum(len(text) + 1 for text in TEXTS)
    assert float(whole.ctc) > 1.0
    assert_adds_up(whole, [model(lay_out([a, b])), model(lay_out([c, d]))])
    assert_adds_up(whole, [model(lay_out([u])) for u in utterances])
    assert_adds_up(whole, [model(lay_out([d, b], [c, a]))])
    assert_adds_up(whole, [model(lay_out([a], [], [b, c, d], positions=200))])


@torch.inference_mode()
def test_the_loss_is_the_cross_entropy_of_the_text_after_the_audio(
    utterances: list[Utterance],
) -> None:
    model = awake()
    for utterance, prompt, answer in zip(utterances, PROMPTS, TEXTS, strict=True):
        assert utterance.features is not None
        soft = model.project(stack_frames(utterance.features[0], 4))[None]
        text = [*answer, END]
        idx = torch.tensor([[BOS, *prompt, *answer]])
        logits = model.lm(idx, audio_features=soft)[0, -len(text) :]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="sum")
        sums = model(lay_out([utterance]))
        torch.testing.assert_close(sums.loss, wanted, rtol=1e-5, atol=1e-4)
        assert int(sums.tokens) == len(text)
        assert int(sums.correct) == int((logits.argmax(-1) == torch.tensor(text)).sum())


@torch.inference_mode()
def test_correct_counts_the_tokens_that_are_guessed(utterances: list[Utterance]) -> None:
    model = awake()
    model.lm.lm_head.weight.zero_()
    assert int(model(lay_out(utterances)).correct) == 0  # ties go to token 0
    batch = lay_out(utterances)
    silent = replace(batch, targets_BT=torch.where(batch.targets_BT == IGNORED, IGNORED, 0))
    sums = model(silent)
    assert int(sums.correct) == int(sums.tokens) == 17


@torch.inference_mode()
def test_a_rejected_utterance_leaves_padding(utterances: list[Utterance]) -> None:
    model = awake()
    a, b, c, _ = utterances
    rejected = replace(b, features=None)
    with_gap, without = lay_out([a, rejected, c]), lay_out([a, c])
    assert_adds_up(model(with_gap), [model(without)])
    spared = int((lay_out([a, b, c]).segments_BT > 0).sum() - (with_gap.segments_BT > 0).sum())
    assert b.features is not None
    assert spared == -(-len(b.features[0]) // 4) + 1 + len(PROMPTS[1]) + len(TEXTS[1])
    padding = with_gap.segments_BT == 0
    assert bool((with_gap.targets_BT[padding] == IGNORED).all())
    assert not with_gap.audio_mask_BT[padding].any()


def test_a_batch_without_audio_gives_zero_loss_and_zero_gradients(
    utterances: list[Utterance],
) -> None:
    rejected = [replace(utterance, features=None) for utterance in utterances]
    for batch in (lay_out([]), lay_out([], []), lay_out(rejected)):
        assert batch.audio_NF.shape == (0, 4 * 384)
        model = awake().train()
        sums = model(batch)
        assert [v.item() for v in (sums.loss, sums.tokens, sums.correct, sums.ctc)] == [0.0] * 4
        (sums.loss + sums.ctc).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name  # NaN would count as something


def test_every_parameter_learns_from_a_batch(utterances: list[Utterance]) -> None:
    model = awake().train()
    sums = model(lay_out(utterances))
    (sums.loss + sums.ctc).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# --- regularisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dropout", "token_dropout", "audio_dropout"])
@torch.inference_mode()
def test_dropout_acts_in_training_only(utterances: list[Utterance], kind: str) -> None:
    batch = lay_out(utterances)
    wanted = awake()(batch)
    model = awake(replace(CONFIG, **{kind: 0.5}))
    assert torch.equal(model(batch).loss, wanted.loss)
    model.train()
    first, second = model(batch), model(batch)
    assert not torch.equal(first.loss, second.loss)
    assert int(first.tokens) == int(wanted.tokens)


@torch.inference_mode()
def test_hidden_tokens_take_their_value_embedding_along(utterances: list[Utterance]) -> None:
    # With nearly all text hidden, the loss cannot depend on which tokens stand there.
    model = awake(replace(CONFIG, token_dropout=0.999999)).train()
    batch = lay_out(utterances)
    others = replace(batch, tokens_BT=(batch.tokens_BT + 1) % SMALL.vocab_size)
    assert torch.equal(model(batch).loss, model(others).loss)
    assert not torch.equal(model.eval()(batch).loss, model(others).loss)


@torch.inference_mode()
def test_hidden_audio_still_reaches_ctc(utterances: list[Utterance]) -> None:
    model = awake(replace(CONFIG, audio_dropout=0.999999)).train()
    batch = lay_out(utterances)
    deaf = replace(batch, audio_NF=torch.zeros_like(batch.audio_NF))
    assert torch.equal(model(batch).loss, model(deaf).loss)
    assert torch.equal(model(batch).ctc, awake()(batch).ctc)


@pytest.mark.parametrize("kind", ["gpt", "transformers"])
def test_a_hidden_first_position_leaves_gradients_of_deep_models_finite(
    utterances: list[Utterance], kind: str
) -> None:
    """It sees no other: an exact zero there would stay zero through all layers."""
    lm = wrapped("llama", num_hidden_layers=24) if kind == "transformers" else None
    shape = replace(SMALL, n_layer=24) if lm is None else lm.config
    model = OmniModel(OmniConfig(shape, feature_dim=384, audio_dropout=0.999999), lm).train()
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".c_proj.weight", ".o_proj.weight", ".down_proj.weight")):
                torch.nn.init.normal_(parameter, std=1.0)
    sums = model(lay_out(utterances))
    sums.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert sums.loss.isfinite()


def test_hidden_positions_have_the_size_of_embeddings() -> None:
    assert float(awake()._hidden_input().square().mean()) == pytest.approx(1.0)
    lm = wrapped("gemma3_text", initializer_range=0.1)
    model = OmniModel(OmniConfig(lm.config, feature_dim=8, projector="swiglu"), lm)
    embedded = lm.embed(torch.arange(50)[None]).detach()
    size = float(model._hidden_input().square().mean())
    assert size == pytest.approx(float(embedded.square().mean()), rel=0.1)


@pytest.mark.parametrize("ctc", [False, True])
def test_the_first_gradients_are_of_a_usual_size(utterances: list[Utterance], ctc: bool) -> None:
    """Also of a deep model that is trained already: no soft token starts at zero."""
    model = OmniModel(replace(CONFIG, ctc=ctc, lm=replace(SMALL, n_layer=12)))
    awaken(model.lm)
    lm = {name: value.clone() for name, value in model.lm.state_dict().items()}
    model.init_weights(0)
    model.lm.load_state_dict(lm)
    sums = model(lay_out(utterances))
    (sums.ctc if ctc else sums.loss).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / sums.tokens
    assert 0.01 < float(norm) < 100, norm


# --- CTC -----------------------------------------------------------------------------------------


def test_ctc_trains_the_projector_and_leaves_the_language_model(
    utterances: list[Utterance],
) -> None:
    model = OmniModel(CONFIG)
    model.init_weights(0)
    model.train()
    assert model.ctc_head is not None
    batch = lay_out(utterances)
    trained = [*model.projector.parameters(), *model.ctc_head.parameters()]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(30):
        sums = model(batch)
        model.zero_grad()
        sums.ctc.backward()
        optimizer.step()
        losses.append(float(sums.ctc.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert model.projector.fc1.weight.grad is not None and model.projector.fc1.weight.grad.any()
    assert model.projector.fc2.weight.any(), "it was zero"
    for parameter in model.lm.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@torch.inference_mode()
def test_ctc_reads_each_transcript_off_its_own_audio(utterances: list[Utterance]) -> None:
    model = awake()
    assert model.ctc_head is not None
    total = 0.0
    for utterance, text in zip(utterances, TEXTS, strict=True):
        assert utterance.features is not None
        soft = model.project(stack_frames(utterance.features[0], 4))
        normed = torch.nn.functional.rms_norm(soft, (48,))
        log_probs = model.ctc_head(normed, model.lm).log_softmax(-1)
        assert log_probs.shape[-1] == SMALL.vocab_size + 1
        total += -np.logaddexp.reduce(ctc_paths(log_probs, text, blank=100))
    assert float(model(lay_out(utterances)).ctc) == pytest.approx(total, rel=1e-4)


def ctc_paths(log_probs: Tensor, label: list[int], blank: int) -> tuple[float, float]:
    """Log probabilities of ending with the last token or with a blank (Graves et al. 2006, 4.1)."""
    extended = [blank]
    for token in label:
        extended += [token, blank]
    rows = log_probs.double().numpy()
    alpha = np.full(len(extended), -np.inf)
    alpha[0], alpha[1] = rows[0, blank], rows[0, label[0]]
    for row in rows[1:]:
        before = alpha.copy()
        for place, token in enumerate(extended):
            ways = [before[place]]
            if place >= 1:
                ways.append(before[place - 1])
            if place >= 2 and token != blank and token != extended[place - 2]:
                ways.append(before[place - 2])
            alpha[place] = np.logaddexp.reduce(ways) + row[token]
    return alpha[-1], alpha[-2]


def test_a_transcript_that_does_not_fit_its_audio_has_no_ctc_loss(
    utterances: list[Utterance],
) -> None:
    model = awake()
    a, b, *_ = utterances
    assert b.features is not None
    impossible = spoken(b.features[0], [], [30] * 40, bos=BOS, end=END)
    sums = model(lay_out([a, impossible], positions=300))
    assert sums.ctc.item() == pytest.approx(model(lay_out([a])).ctc.item(), rel=1e-4)
    sums.ctc.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.inference_mode()
def test_without_a_ctc_head_its_loss_is_zero(utterances: list[Utterance]) -> None:
    model = awake(replace(CONFIG, ctc=False))
    assert model.ctc_head is None
    assert float(model(lay_out(utterances)).ctc) == 0.0


@torch.inference_mode()
def test_only_what_is_said_is_a_label(utterances: list[Utterance]) -> None:
    """Neither the answers of other tasks, nor those of a conversation."""
    model = awake()
    a, b, c, d = utterances
    alone = [float(model(lay_out([u])).ctc) for u in utterances]
    asked = replace(b, transcript_tokens=[None])
    sums = model(lay_out([a, asked, c], [d]))
    assert float(sums.ctc) == pytest.approx(alone[0] + alone[2] + alone[3], rel=1e-4)
    assert int(sums.tokens) == sum(len(text) + 1 for text in TEXTS), "answers are learnt anyhow"
    assert float(model(lay_out([asked])).ctc) == 0.0
    assert a.features is not None and c.features is not None
    talk = Utterance(
        [a.features[0], c.features[0]],
        [BOS, AUDIO, 30, 31, END, AUDIO, 32, END],
        [False, False, True, True, True, False, True, True],
    )
    assert float(model(lay_out([talk])).ctc) == 0.0
    heard = replace(talk, transcript_tokens=[TEXTS[0], None])
    assert float(model(lay_out([heard])).ctc) == pytest.approx(alone[0], rel=1e-4)
    both = replace(talk, transcript_tokens=[TEXTS[0], TEXTS[2]])
    assert float(model(lay_out([both])).ctc) == pytest.approx(alone[0] + alone[2], rel=1e-4)


@pytest.mark.parametrize("vocabulary", ["small", "large"])
@pytest.mark.parametrize("ctc_only", [False, True])
def test_a_microbatch_waits_for_the_device_nowhere(
    utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch, vocabulary: str, ctc_only: bool
) -> None:
    """Fake tensors have no values: whatever depends on one is an error."""
    hidden = {"dropout": 0.1, "token_dropout": 0.1, "audio_dropout": 0.1}
    a, b, c, _ = utterances
    members = [a, replace(b, transcript_tokens=[None]), c]
    batch = lay_out(members, positions=600)  # Longer than what plain products attend to.
    lengths: list[object] = []

    def ctc_loss(log_probs: Tensor, labels: Tensor, *others: object, **more: object) -> Tensor:
        """torch.ctc_loss has no fake version: the size of its buffer depends on the labels."""
        lengths.extend(others[:2])
        return log_probs.sum((0, 2))

    monkeypatch.setattr(torch, "ctc_loss", ctc_loss)
    if vocabulary == "large":
        monkeypatch.setattr("omni.model.ctc._FULL_SOFTMAX_CLASSES", 10)
    # How segments attend differs between CPU and GPU.
    plain = staticmethod(lambda segments: SegmentLayout.plain(segments.shape, segments.device))
    monkeypatch.setattr("omni.model.batch.SegmentLayout.packed", plain)
    with FakeTensorMode() as mode:
        model = OmniModel(replace(CONFIG, **hidden)).train()
        model.task_weights = torch.ones(2)
        sums = model(fake(batch, mode), ctc_only)
        (sums.loss + sums.ctc).backward()
    assert [type(given) for given in lengths] == [tuple, tuple], "known without the device"


def fake(item: Any, mode: FakeTensorMode) -> Any:
    """The tensors of a dataclass without their values."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = mode.from_tensor(value)
        elif is_dataclass(value):
            values[name] = fake(value, mode)
    return replace(item, **values)


# --- configuration and initialisation ------------------------------------------------------------


def test_a_config_survives_json_and_cannot_be_changed() -> None:
    config = replace(CONFIG, projector_hidden=64, dropout=0.1, token_dropout=0.2, audio_dropout=0.3)
    assert OmniConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(FrozenInstanceError):
        config.stack = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.lm.n_layer = 2  # type: ignore[misc]


def test_a_seed_decides_all_weights_whatever_was_drawn_before() -> None:
    first, second, other = (OmniModel(CONFIG) for _ in range(3))
    first.init_weights(7)
    torch.rand(13)
    second.init_weights(7)
    other.init_weights(8)
    states = first.state_dict(), second.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name in ("projector.fc1.weight", "lm.transformer.wte.weight", "ctc_head.weight"):
        assert not torch.equal(states[0][name], states[2][name])


@torch.inference_mode()
def test_an_untrained_model_is_as_good_as_guessing(utterances: list[Utterance]) -> None:
    model = OmniModel(replace(CONFIG, ctc=False)).eval()
    model.init_weights(0)
    sums = model(lay_out(utterances))
    assert float(sums.loss / sums.tokens) == pytest.approx(np.log(SMALL.vocab_size), rel=0.01)


def test_a_batch_moves_as_a_whole(utterances: list[Utterance]) -> None:
    batch = lay_out(utterances)
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert len(tensors) == 10 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.audio_NF.shape == batch.audio_NF.shape
