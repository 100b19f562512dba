"""Code written against nanochat-omni's `audio.py` runs: names, signatures, shapes, sources."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omni.model import GPT, Projector, WhisperEncoder, load_whisper
from omni.model.encoder.weights import EMBEDDED_WHISPER
from tests.helpers.loopback_hub import closed_port, serve
from tests.helpers.small_gpt import SMALL, awake_gpt
from tests.model.test_download import load_elsewhere

LOAD = """
import sys
import numpy as np
from omni.model import WhisperEncoder, load_whisper
from omni.model.download import SourceError
given = sys.argv[1:]
try:
    encoder = WhisperEncoder(*given)
    features = encoder(encoder.preprocess([np.zeros(16000, np.float32)]))
    extractor, same = load_whisper(*given)
    print(encoder.fingerprint, tuple(features.shape), extractor.sampling_rate, same.config.d_model)
except SourceError as error:
    print(error)
"""


def test_the_signatures_are_the_seeds() -> None:
    of_load = list(inspect.signature(load_whisper).parameters.values())
    of_class = list(inspect.signature(WhisperEncoder).parameters.values())[:4]
    assert [(p.name, p.default) for p in of_load] == [
        ("hf_id", "openai/whisper-base"),
        ("ms_id", None),
    ]
    assert [(p.name, p.default) for p in of_class] == [
        ("hf_id", "openai/whisper-base"),
        ("ms_id", None),
        ("device", None),
        ("dtype", None),
    ]


def test_importing_the_room_loads_no_network() -> None:
    code = "import sys, omni.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("source", ["embedded", "folder"])
def test_the_encoder_is_used_as_in_the_seed(
    source: str, clips: list[np.ndarray], tmp_path: Path
) -> None:
    if source == "folder":
        source = str(shutil.copytree(EMBEDDED_WHISPER, tmp_path / "whisper"))
    encoder = WhisperEncoder(source, None, "cpu", torch.float32)
    assert isinstance(encoder.encoder, nn.Module) and len(encoder.encoder.layers) == 4
    assert (encoder.d_model, encoder.sampling_rate) == (384, 16_000)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    input_features = encoder.preprocess(clips[:1])
    assert input_features.shape == (1, 80, 3000)
    features = encoder(input_features)
    assert features.shape == (1, 1500, 384) and features.dtype == torch.float32


def test_preprocess_equals_the_feature_extractor(clips: list[np.ndarray]) -> None:
    encoder = WhisperEncoder("embedded")
    wanted = encoder.feature_extractor(
        clips[:3], sampling_rate=encoder.sampling_rate, return_tensors="pt"
    ).input_features
    assert torch.equal(encoder.preprocess(clips[:3]), wanted)


def test_a_folder_without_preprocessor_config_has_the_extractor_of_its_config(
    clips: list[np.ndarray], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(EMBEDDED_WHISPER / name, tmp_path)
    extractor, _ = load_whisper(str(tmp_path))
    mel = extractor(clips[0], sampling_rate=16_000, return_tensors="pt").input_features
    assert torch.equal(mel, WhisperEncoder("embedded").preprocess(clips[:1]))


def test_load_whisper_returns_extractor_and_encoder(clips: list[np.ndarray]) -> None:
    extractor, encoder = load_whisper("embedded")
    assert type(extractor).__name__ == "WhisperFeatureExtractor"
    assert encoder.config.d_model == 384 and not encoder.training
    mel = extractor(clips[:2], sampling_rate=16_000, return_tensors="pt").input_features
    hidden = encoder(mel).last_hidden_state
    assert torch.equal(hidden, WhisperEncoder("embedded")(mel))


def test_features_train_a_projector_through_the_gpt(clips: list[np.ndarray]) -> None:
    encoder = WhisperEncoder(hf_id="embedded", dtype=torch.float32)
    gpt, projector = awake_gpt(), Projector(encoder.d_model * 100, SMALL.n_embd)
    assert isinstance(gpt, GPT)
    soft = projector(encoder(encoder.preprocess(clips[:1])).view(1, 15, -1))
    ids = torch.arange(1, 6)[None]
    gpt(ids, targets=ids, audio_features=soft).backward()
    gradient = projector.fc2.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_arguments_and_environment_choose_the_source(tmp_path: Path) -> None:
    known = f"{WhisperEncoder('embedded').fingerprint} (1, 1500, 384) 16000 384"
    with serve("someone/whisper", EMBEDDED_WHISPER) as hub:
        endpoints = {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url}
        # An id that is given wins over the environment's.
        other = {"WHISPER_MS_ID": "someone/absent", "WHISPER_HF_ID": "someone/absent"}
        home = tmp_path / "hf"
        assert load_elsewhere(home, "someone/whisper", script=LOAD, **endpoints, **other) == known
        assert hub.modelscope == [] and hub.hugging_face
        # ModelScope is asked before Hugging Face.
        home = tmp_path / "ms"
        before = len(hub.hugging_face)
        arguments = ("someone/absent", "someone/whisper")
        assert load_elsewhere(home, *arguments, script=LOAD, **endpoints) == known
        assert hub.modelscope and len(hub.hugging_face) == before


def test_one_error_lists_every_source_with_its_reason(tmp_path: Path) -> None:
    down = {"HF_ENDPOINT": closed_port(), "MODELSCOPE_ENDPOINT": closed_port()}
    said = load_elsewhere(tmp_path, "someone/a", "someone/b", script=LOAD, **down).splitlines()
    assert [line.split(": ")[0] for line in said[1:]] == [
        "  ModelScope someone/b",
        "  Hugging Face someone/a",
    ]
    assert all("refused" in line for line in said[1:])
