"""Distillation from the reader of the transcript, and CTC in the space of token embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.model.batch import IGNORED, Batch
from omni.model.chat_template import AUDIO
from omni.model.ctc import TiedCTC
from omni.model.lm.lora import LoraShape
from omni.model.losses import Distillation
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.stream.collate import Utterance, collate
from tests.helpers.hf_folders import VOCABULARY, wrapped

END = 2
TEXTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for number, text in enumerate(TEXTS):
        ids = [20, AUDIO, 21, *text, END]
        supervised = [False] * 3 + [True] * (len(text) + 1)
        features = torch.randn(20 + 9 * number, 16, generator=generator)
        made.append(Utterance([features], ids, supervised, transcript_tokens=[text]))
    return made


def lay_out(utterances: list[Utterance]) -> Batch:
    return collate([utterances], positions=80, stack=4, frame_dim=16, teacher=True, ctc=True)


def a_model(lora: LoraShape | None = None, ctc: bool = False) -> OmniModel:
    lm = wrapped()
    config = OmniConfig(lm.config, 16, projector="swiglu", lora=lora, ctc=ctc)
    model = OmniModel(config, lm)
    model.init_weights(0)
    model.distillation = Distillation(temperature=2.0, end=END, end_weight=3.0)
    return model


# --- what the teacher reads ----------------------------------------------------------------------


def test_the_teacher_reads_the_transcript_in_the_place_of_the_audio(
    utterances: list[Utterance],
) -> None:
    batch = lay_out(utterances)
    teacher = batch.teacher
    assert teacher is not None and not teacher.audio_mask_BT.any()
    assert teacher.tokens_BT[0, :7].tolist() == [20, 5, 6, 7, 21, 5, 6]
    assert teacher.segments_BT[0, :7].tolist() == [1] * 7
    # The same tokens are learnt, in the same order.
    wanted = batch.targets_BT[batch.targets_BT != IGNORED]
    assert teacher.targets_BT[teacher.targets_BT != IGNORED].tolist() == wanted.tolist()


def test_a_rejected_utterance_is_not_read_either(utterances: list[Utterance]) -> None:
    a, b, c = utterances
    batch = lay_out([a, replace(b, features=None), c])
    assert batch.teacher is not None
    assert (batch.teacher.targets_BT != IGNORED).sum() == (batch.targets_BT != IGNORED).sum()


def test_a_teacher_without_transcripts_is_an_error(utterances: list[Utterance]) -> None:
    with pytest.raises(ValueError, match=r"\btranscript\b"):
        lay_out([replace(utterances[0], transcript_tokens=None)])


# --- the divergence ------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_divergence_is_that_of_next_token_distributions(utterances: list[Utterance]) -> None:
    model = a_model().eval()
    total = 0.0
    for utterance in utterances:
        batch = lay_out([utterance])
        assert utterance.transcript_tokens is not None
        text = list(utterance.transcript_tokens[0] or ())
        soft = model.project(batch.audio_NF, batch.audio_starts_N)
        student = _distributions(model, [20], soft, [21, *text])[-len(text) - 1 :]
        teacher = _distributions(model, [20, *text, 21, *text], soft[:0], [])[-len(text) - 1 :]
        each = (teacher.exp() * (teacher - student)).sum(-1) * 4  # T^2
        each[-1] *= 3.0  # the end token
        total += float(each.sum())
    assert float(model(lay_out(utterances)).kl) == pytest.approx(total, rel=1e-4)
    assert total > 0.1


def _distributions(model: OmniModel, before: list[int], soft: Tensor, after: list[int]) -> Tensor:
    """Log probabilities at temperature 2, by transformers alone."""
    parts = [model.lm.embed(torch.tensor([before]))[0], soft]
    if after:
        parts.append(model.lm.embed(torch.tensor([after]))[0])
    logits = model.lm.model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
    return (logits / 2.0).log_softmax(-1)


def test_the_teacher_is_the_model_without_adapters_and_gets_no_gradient(
    utterances: list[Utterance],
) -> None:
    batch = lay_out(utterances)
    model = a_model(LoraShape(4, 8)).train()
    model.train_parts(["projector", "lora"])
    assert batch.teacher is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.5)
        adapted = float(model(batch).kl)
        plain = float(a_model()(batch).kl)
    assert adapted != pytest.approx(plain, rel=1e-3), "the student has its adapters"
    kl = model(batch).kl
    kl.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".lora_A." in name for name in learns)
    assert any(name.startswith("projector.") for name in learns)
    assert model.training and model.lm.training
    # A student that reads what the teacher reads differs by its adapters alone.
    heard = replace(batch.teacher, teacher=batch.teacher, audio_NF=batch.audio_NF[:0])
    assert float(a_model()(heard).kl.detach()) == pytest.approx(0.0, abs=1e-5)


# --- CTC in the space of token embeddings --------------------------------------------------------


def test_a_soft_token_that_is_an_embedding_is_read_as_its_token() -> None:
    model = a_model(ctc=True)
    head = model.ctc_head
    assert isinstance(head, TiedCTC)
    rows = model.lm.embedding_matrix()
    soft = F.rms_norm(rows.detach(), rows.shape[-1:])
    with torch.no_grad():
        logits = head(soft, model.lm)
    assert logits.shape == (VOCABULARY, VOCABULARY + 1)
    assert logits.argmax(-1).tolist() == list(range(VOCABULARY))


def test_ctc_teaches_the_projector_to_speak_in_embeddings(utterances: list[Utterance]) -> None:
    model = a_model(ctc=True).train()
    model.train_parts(["projector"])
    model.distillation = None
    batch = replace(lay_out(utterances), teacher=None)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sums = model(batch, True)
        assert not sums.loss and int(sums.tokens) == 13, "the language model is left out"
        sums.ctc.backward()
        optimizer.step()
    assert model.ctc_head is not None
    with torch.no_grad():
        soft = model.project(batch.audio_NF, batch.audio_starts_N)
        best = model.ctc_head(F.rms_norm(soft, soft.shape[-1:]), model.lm).argmax(-1)
    read, at = [], 0
    for utterance in utterances:
        assert utterance.features is not None
        count = -(-len(utterance.features[0]) // 4)
        path = best[at : at + count].unique_consecutive().tolist()
        read.append([token for token in path if token != VOCABULARY])
        at += count
    assert read == TEXTS
