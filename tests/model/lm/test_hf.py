"""Any causal language model of transformers: packed, decoded, adapted, as it would be alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omni.model.batch import Batch
from omni.model.download import SourceError
from omni.model.lm.generate import continue_prompts, generate
from omni.model.lm.hf import HFLanguageModel, read_config
from omni.model.lm.lora import LoraShape, is_adapter, merge_lora, without_adapters
from omni.model.lm.pretrained import find_pretrained, load_lm
from omni.model.lm.prompts import EmbeddedPrompt
from omni.model.packed_attention import SegmentLayout
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.stream.collate import Utterance, collate
from tests.helpers.hf_folders import (
    ARCHITECTURES,
    VOCABULARY,
    chat_tokenizer,
    random_model,
    save_folder,
    wrapped,
)
from tests.helpers.utterances import spoken

LENGTHS = (7, 11, 4)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (sum(LENGTHS) + 2,), generator=generator)


def packed_layout() -> SegmentLayout:
    """The three segments and two positions of padding."""
    parts = [torch.full((n,), i) for i, n in enumerate(LENGTHS, start=1)]
    return SegmentLayout.packed(torch.cat([*parts, torch.zeros(2, dtype=torch.long)])[None])


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).abs().max() / wanted.abs().max())


def continued(
    lm: HFLanguageModel, embedded: list[Tensor], limits: list[int], end: int
) -> list[tuple[list[int], bool]]:
    prompts = [
        EmbeddedPrompt(x, torch.zeros(len(x), dtype=torch.long), x[:0], 0.0) for x in embedded
    ]
    found = continue_prompts(lm, prompts, end, limits)
    return [(finished.answer.ids, finished.answer.cut) for finished in found]


# --- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.inference_mode()
def test_a_packed_segment_sees_itself_only(kind: str, ids: Tensor) -> None:
    lm = wrapped(kind)
    lm.check_head()
    alone = random_model(kind, attention="eager")
    hidden = lm.trunk(lm.embed(ids[None]), ids[None], packed_layout())
    logits = lm.logits(hidden)[0]
    assert logits.dtype == torch.float32
    at = 0
    for length in LENGTHS:
        wanted = alone(input_ids=ids[None, at : at + length], use_cache=False).logits[0]
        assert relative(logits[at : at + length], wanted) < 1e-5
        at += length


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
@torch.inference_mode()
def test_rows_of_different_lengths_are_continued_as_if_alone(kind: str, ids: Tensor) -> None:
    lm, alone = wrapped(kind), random_model(kind, attention="eager")
    rows = [ids[:7], ids[7:18]]
    wanted = []
    for row in rows:
        answer: list[int] = []
        for _ in range(6):
            sequence = torch.cat((row, torch.tensor(answer, dtype=torch.long)))[None]
            answer.append(int(alone(input_ids=sequence, use_cache=False).logits[0, -1].argmax()))
        wanted.append(answer)
    embedded = [lm.embed(row[None])[0] for row in rows]
    never = next(n for n in range(VOCABULARY) if all(n not in answer for answer in wanted))
    assert continued(lm, embedded, [6, 4], never) == [(wanted[0], True), (wanted[1][:4], True)]
    end = wanted[0][2]
    ended = [
        (answer[: answer.index(end)], False) if end in answer else (answer, True)
        for answer in wanted
    ]
    assert continued(lm, embedded, [6, 6], end) == ended
    # A limit that an answer and its end token just fit.
    whole = ended[0][0]
    assert continued(lm, embedded, [len(whole) + 1, 6], end)[0] == (whole, False)
    if whole:
        assert continued(lm, embedded, [len(whole), 6], end)[0] == (whole, True)


@torch.inference_mode()
def test_a_model_writes_no_further_than_it_has_positions(ids: Tensor) -> None:
    for kind, length in (("gpt2", 6), ("llama", 9)):
        lm = wrapped(kind, n_positions=16, max_position_embeddings=16)
        embedded = [lm.embed(ids[None, :10])[0]]
        [(answer, cut)] = continued(lm, embedded, [9], VOCABULARY + 1)
        assert len(answer) == length and cut


@pytest.mark.parametrize(
    ("kind", "named"),
    [("gemma2", "Gemma2"), ("bloom", "BloomForCausalLM"), ("falcon", "FalconForCausalLM")],
)
def test_architectures_that_would_compute_something_else_are_refused(kind: str, named: str) -> None:
    with pytest.raises(SourceError, match=named):
        wrapped(kind).check_head()


def test_recomputing_changes_memory_and_nothing_else(ids: Tensor) -> None:
    gradients = []
    for recompute in (False, True):
        lm = wrapped().train()
        if recompute:
            lm.recompute()
        x = lm.embed(ids[None]).detach().requires_grad_(True)
        losses, _ = lm.loss(lm.trunk(x, ids[None], packed_layout())[0], ids)
        losses.sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].any()


# --- the speech language model around it ---------------------------------------------------------


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(30, 5), (11, 3), (50, 8)]
    return [
        spoken(
            torch.randn(frames, 16, generator=generator),
            [4, 5],
            torch.randint(3, 300, (text,), generator=generator).tolist(),
            bos=1,
            end=2,
        )
        for frames, text in shapes
    ]


def lay_out(*bins: list[Utterance], positions: int = 80) -> Batch:
    return collate(bins, positions=positions, stack=4, frame_dim=16)


def omni_model(lora: LoraShape | None = None, **changes: object) -> OmniModel:
    lm = wrapped()
    config = OmniConfig(lm.config, 16, projector="swiglu", lora=lora, **changes)
    model = OmniModel(config, lm)
    model.init_weights(0)
    return model


def test_sums_add_up_over_any_split(utterances: list[Utterance]) -> None:
    model = omni_model().eval()
    a, b, c = utterances
    with torch.inference_mode():
        whole = model(lay_out([a, b, c]))
        for parts in ([[a], [b], [c]], [[c, a], [b]]):
            sums = [model(lay_out(part)) for part in parts]
            assert float(whole.loss) == pytest.approx(sum(float(s.loss) for s in sums), rel=1e-5)
            assert int(whole.tokens) == sum(int(s.tokens) for s in sums) == 5 + 3 + 8 + 3


def test_soft_tokens_begin_with_the_size_of_embeddings(utterances: list[Utterance]) -> None:
    model = omni_model()
    assert isinstance(model.lm, HFLanguageModel)
    batch = lay_out(utterances)
    soft = model.project(batch.audio_NF, batch.audio_starts_N)
    size = model.lm.embed(torch.arange(VOCABULARY)[None]).square().mean().sqrt()
    assert float(soft.square().mean().sqrt()) == pytest.approx(float(size), rel=0.05)


def test_adapters_begin_as_nothing_and_learn_alone(utterances: list[Utterance]) -> None:
    batch = lay_out(utterances)
    plain, model = omni_model(), omni_model(LoraShape(4, 8))
    with torch.no_grad():
        wanted = plain(batch).loss
        torch.testing.assert_close(model(batch).loss, wanted)
    model.train_parts(["projector", "lora"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):  # B is zero at first, and A gets no gradient through it
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (is_adapter(name) or name.startswith("projector.")), name
    with torch.no_grad():
        adapted = model(batch).loss
        with without_adapters(model.lm):
            without = model(batch).loss
        assert not torch.isclose(adapted, without)
        torch.testing.assert_close(model(batch).loss, adapted)
        flags = [p.requires_grad for p in model.parameters()]
        merge_lora(model.lm)
        torch.testing.assert_close(model(batch).loss, adapted)
    assert sum(flags) == len(trained)
    assert not any(is_adapter(name) for name, _ in model.named_parameters())


def test_transcripts_do_not_depend_on_the_batch(utterances: list[Utterance]) -> None:
    model = omni_model().eval()
    prompts = [list(u.prompt) for u in utterances]
    features = [list(u.features or ()) for u in utterances]
    together = generate(model, prompts, features, end=2)
    alone = [generate(model, [p], [f], end=2)[0] for p, f in zip(prompts, features, strict=True)]
    assert together == alone and all(together)


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_gives_shape_tokenizer_and_weights(tmp_path: Path, ids: Tensor) -> None:
    save_folder(tmp_path)
    found = find_pretrained(f"hf:{tmp_path}")
    assert (found.shape.width, found.shape.vocab_size) == (64, VOCABULARY)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("please <|im_end|>") == chat_tokenizer().encode(
        "please <|im_end|>"
    )
    config = OmniConfig(found.shape, 16, source=found.source)
    lm = load_lm(config)
    assert lm is not None
    with torch.no_grad():
        x = lm.embed(ids[None])
        wanted = random_model()(input_ids=ids[None, :7]).logits[0]
        assert relative(lm.logits(lm.trunk(x, ids[None], packed_layout()))[0, :7], wanted) < 1e-5
    frozen = load_lm(config, torch.bfloat16)
    assert frozen is not None
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert frozen.embed(ids[None]).dtype == torch.float32


def test_other_weights_than_the_run_was_made_with_are_refused(tmp_path: Path) -> None:
    save_folder(tmp_path)
    found = find_pretrained(f"hf:{tmp_path}")
    save_folder(tmp_path, hidden_act="gelu", rms_norm_eps=1e-3, initializer_range=0.1)
    config = OmniConfig(found.shape, 16, source=found.source)
    with pytest.raises(SourceError, match=f"hf:{tmp_path}: .*weights"):
        load_lm(config)
    assert load_lm(replace(config, source=None)) is None


def test_what_is_no_language_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"hf:{tmp_path}/absent: "):
        find_pretrained(f"hf:{tmp_path / 'absent'}")
    with pytest.raises(SourceError, match=f"{tmp_path}: "):
        find_pretrained(f"hf:{tmp_path}")
    save_folder(tmp_path, tokenizer=False)
    with pytest.raises(SourceError, match="tokenizer"):
        find_pretrained(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\*\.safetensors.*\bGGUF\b"):
        find_pretrained(f"hf:{tmp_path}", with_tokenizer=False)


def test_a_shape_survives_json(tmp_path: Path) -> None:
    save_folder(tmp_path)
    config = OmniConfig(read_config(tmp_path), 16, lora=LoraShape(4, 8, ("q_proj",)))
    assert OmniConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", ["audio_dropout", "token_dropout"])
def test_gradients_survive_hidden_positions_in_a_deep_model(
    kind: str, utterances: list[Utterance]
) -> None:
    lm = wrapped(num_hidden_layers=30, initializer_range=0.3)
    config = OmniConfig(lm.config, 16, projector="swiglu", lora=LoraShape(4, 8), **{kind: 0.9})
    model = OmniModel(config, lm).train()
    model.init_weights(0)
    model.train_parts(["projector", "lora"])
    torch.manual_seed(0)
    model(lay_out(utterances)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
