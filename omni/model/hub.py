"""Where Whisper's weights come from: ModelScope, Hugging Face, a folder, or omni's own assets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED_WHISPER = ASSETS / "whisper-tiny.en"
DEFAULT_HF_ID = "openai/whisper-base"

_SMALL = ["config.json", "preprocessor_config.json"]
_SAFETENSORS = [*_SMALL, "model.safetensors", "model-*.safetensors", "*.safetensors.index.json"]
_TORCH_BIN = [*_SMALL, "pytorch_model.bin"]


class SourceError(RuntimeError):
    """No source could serve the weights; the message names each with its reason."""


def whisper_folder(source: str | None = None) -> Path:
    """Resolve `source` to a local folder in transformers layout, downloading if needed."""
    if source == "embedded":
        return EMBEDDED_WHISPER
    if source is not None:
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise SourceError(f"encoder weights {source!r}: expected a folder with config.json")
        return folder
    attempts: list[tuple[str, Callable[[list[str]], str]]] = []
    if ms_id := os.environ.get("WHISPER_MS_ID"):
        attempts.append((f"ModelScope {ms_id}", lambda files: _from_modelscope(ms_id, files)))
    hf_id = os.environ.get("WHISPER_HF_ID") or DEFAULT_HF_ID
    attempts.append((f"Hugging Face {hf_id}", lambda files: _from_hugging_face(hf_id, files)))
    reasons = []
    for name, fetch in attempts:
        try:
            folder = Path(fetch(_SAFETENSORS))
            if not list(folder.glob("model*.safetensors")):
                folder = Path(fetch(_TORCH_BIN))
            if not (folder / "config.json").is_file():
                raise FileNotFoundError("the repository holds no config.json")
            if not [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model.bin")]:
                raise FileNotFoundError("no model*.safetensors and no pytorch_model.bin in it")
            return folder
        except Exception as error:  # every hub client has its own family of errors
            reasons.append(f"  {name}: {type(error).__name__}: {_first_line(error)}")
    raise SourceError("no source served the Whisper weights:\n" + "\n".join(reasons))


def _from_modelscope(model_id: str, files: list[str]) -> str:
    from modelscope import snapshot_download

    return snapshot_download(model_id, allow_patterns=files)


def _from_hugging_face(model_id: str, files: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(model_id, allow_patterns=files)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def read_whisper_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the encoder's tensors of a transformers folder; decoder tensors stay on disk.

    Tensor names lose their prefix (`model.encoder.`, `encoder.`). Raises `SourceError` naming the
    folder when weights are missing, or are not Whisper's.
    """
    try:
        return _read(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{folder}: damaged: {_first_line(error)}") from None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "whisper":
        raise SourceError(f"{folder}: model_type is {config.get('model_type')!r}, expected whisper")
    shards = sorted(folder.glob("model*.safetensors"))
    state: dict[str, Tensor] = {}
    if shards:
        for shard in shards:
            with safe_open(shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if (short := _encoder_name(name)) is not None:
                        state[short] = tensors.get_tensor(name)
    elif (folder / "pytorch_model.bin").is_file():
        mapped = torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True)
        for name, tensor in mapped.items():
            if (short := _encoder_name(name)) is not None:
                state[short] = tensor.clone()
    if not state:
        raise SourceError(f"{folder}: no Whisper encoder tensors (model*.safetensors)")
    return config, state


def _encoder_name(name: str) -> str | None:
    for prefix in ("model.encoder.", "encoder."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None
