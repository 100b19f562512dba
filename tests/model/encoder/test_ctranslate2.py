"""Whisper folders of CTranslate2 (faster-whisper), written by CTranslate2 itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ctranslate2.converters.transformers import WhisperLoader
from transformers import WhisperConfig, WhisperForConditionalGeneration

from omni.model.download import SourceError
from omni.model.encoder.weights import EMBEDDED_WHISPER, read_whisper_files
from omni.model.encoder.whisper import WhisperEncoder


def convert(folder: Path, quantization: str | None) -> Path:
    """The embedded encoder with a small decoder of no meaning, as CTranslate2 saves it."""
    config = WhisperConfig.from_pretrained(EMBEDDED_WHISPER)
    config.update({"decoder_layers": 1, "decoder_ffn_dim": 8, "vocab_size": 60})
    config.update({"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1})
    config.update({"eos_token_id": 2})
    model = WhisperForConditionalGeneration(config)
    _, state = read_whisper_files(EMBEDDED_WHISPER)
    model.model.encoder.load_state_dict({name: t.float() for name, t in state.items()})
    spec = WhisperLoader().get_model_spec(model)
    spec.register_vocabulary([f"token {n}" for n in range(60)])
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    return folder


@pytest.mark.parametrize("quantization", [None, "float16"])
def test_the_weights_are_whispers_to_the_last_bit(
    quantization: str | None, tmp_path: Path, clips: list[np.ndarray], trim: WhisperEncoder
) -> None:
    config, state = read_whisper_files(convert(tmp_path, quantization))
    _, wanted = read_whisper_files(EMBEDDED_WHISPER)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name].float(), wanted[name].float()) for name in wanted)
    encoder = WhisperEncoder(str(tmp_path), mode="trim")
    assert encoder.config == trim.config
    assert torch.equal(encoder.encode(clips[:1])[0], trim.encode(clips[:1])[0])


@pytest.mark.parametrize("quantization", ["int8", "int8_float16", "int16"])
def test_quantized_weights_are_multiplied_out(quantization: str, tmp_path: Path) -> None:
    _, state = read_whisper_files(convert(tmp_path, quantization))
    _, wanted = read_whisper_files(EMBEDDED_WHISPER)
    for name, tensor in wanted.items():
        step = float(tensor.float().abs().max()) / 127
        assert float((state[name].float() - tensor.float()).abs().max()) <= step, name


def test_files_that_are_cut_short_or_of_another_kind_are_named(tmp_path: Path) -> None:
    folder = convert(tmp_path / "whisper", "float16")
    whole = (folder / "model.bin").read_bytes()
    for size in (0, 3, 40, 5_000, len(whole) // 4):
        (folder / "model.bin").write_bytes(whole[:size])
        with pytest.raises(SourceError, match="damaged: "):
            read_whisper_files(folder)
    for data, message in (
        (b"\x63\0\0\0" + whole[4:], "version 99: expected"),
        (whole.replace(b"WhisperSpec", b"NothingSpec", 1), "NothingSpec: expected"),
        (whole.replace(b"encoder/conv1/weight\0", b"encoder/conv9/weight\0", 1), "no conv1/weight"),
    ):
        (folder / "model.bin").write_bytes(data)
        with pytest.raises(SourceError, match=message):
            read_whisper_files(folder)
