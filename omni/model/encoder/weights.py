"""Find Whisper's weights (embedded, in a folder, on a hub) and read those of the encoder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni.errors import first_line
from omni.model.download import ASSETS, HubModel, SourceError, fetch
from omni.model.encoder.ctranslate2 import read_ct2_encoder

EMBEDDED_WHISPER = ASSETS / "whisper-tiny.en"
DEFAULT_HF_ID = "openai/whisper-base"

_SMALL_FILES = ["config.json", "preprocessor_config.json"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "*.safetensors.index.json"]
_TORCH_BIN = ["pytorch_model.bin"]
_CT2 = ["model.bin"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")


@dataclass(frozen=True)
class WhisperConfig:
    """Shape of a Whisper encoder; fields are named as in transformers' config.json."""

    d_model: int
    num_mel_bins: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    encoder_layers: int
    max_source_positions: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WhisperConfig:
        """Pick the fields out of a config.json. Raises ValueError naming the field."""
        for field in fields(cls):
            if type(values.get(field.name)) is not int:
                found = values.get(field.name)
                raise ValueError(f"config.json: {field.name}: expected a number, got {found!r}")
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def whisper_folder(hf_id: str = DEFAULT_HF_ID, ms_id: str | None = None) -> Path:
    """Return the local folder of a Whisper model, downloaded if needed.

    hf_id: an id on Hugging Face (ID or ID@REVISION, at `HF_ENDPOINT`), a folder in the layout of
    transformers or CTranslate2, or "embedded". ms_id: an id on ModelScope, which is tried before
    Hugging Face.
    The environment replaces the default hf_id ("hub" is another name for it): by `WHISPER_HF_ID`,
    and by `WHISPER_MS_ID` where ms_id is None.

    Raises SourceError for a folder without config.json, and HubError listing each hub with its
    reason when none serves the weights.
    """
    if hf_id == "embedded":
        return EMBEDDED_WHISPER
    if hf_id in ("hub", DEFAULT_HF_ID):
        hf_id = os.environ.get("WHISPER_HF_ID") or DEFAULT_HF_ID
        ms_id = ms_id or os.environ.get("WHISPER_MS_ID")
    elif Path(hf_id).expanduser().is_dir() or not _HUB_ID.fullmatch(hf_id):
        return local_whisper(hf_id)
    models = [HubModel.parse("ModelScope", ms_id)] if ms_id else []
    models.append(HubModel.parse("Hugging Face", hf_id))
    return fetch(models, _SMALL_FILES, (_SAFETENSORS, _TORCH_BIN, _CT2))


def local_whisper(folder: str) -> Path:
    """Return the path of a folder that holds a config.json. Raises SourceError naming it."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise SourceError(f"encoder weights {folder!r}: expected a folder with config.json")
    return path


def read_whisper_files(folder: Path) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """Read the encoder's shape and tensors from a folder; the decoder's stay on disk.

    Tensor names lose their prefix (`model.encoder.` or `encoder.`). Raises SourceError naming the
    folder when weights are missing, damaged, or not Whisper's.
    """
    try:
        return _read(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{folder}: damaged: {first_line(error)}") from None


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """Hash names, shapes, dtypes and values of stored weights: 24 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(folder: Path) -> tuple[WhisperConfig, dict[str, Tensor]]:
    if (folder / "model.bin").is_file():
        values, state = read_ct2_encoder(folder)
        return WhisperConfig.from_dict(values), state
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "whisper":
        raise SourceError(f"{folder}: model_type is {config.get('model_type')!r}, expected whisper")
    shards = sorted(folder.glob("model*.safetensors"))
    state = {}
    if shards:
        for shard in shards:
            with safe_open(shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors file is not a dict)
                    if (short := _encoder_name(name)) is not None:
                        state[short] = tensors.get_tensor(name)
    elif (folder / "pytorch_model.bin").is_file():
        mapped = torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True)
        for name, tensor in mapped.items():
            if (short := _encoder_name(name)) is not None:
                state[short] = tensor.clone()
    if not state:
        raise SourceError(f"{folder}: no Whisper encoder tensors (model*.safetensors)")
    return WhisperConfig.from_dict(config), state


def _encoder_name(name: str) -> str | None:
    """Strip the encoder's prefix; None for a tensor of another part."""
    for prefix in ("model.encoder.", "encoder."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None
