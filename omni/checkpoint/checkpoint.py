"""Read a checkpoint and verify that its files are those that were written.

checkpoints/step-000400/
    model.safetensors      weights of the model (averaged, where an average is kept)
    optimizer.safetensors  optimizer state, and the raw weights beside an average
    state.json             training state, fingerprints, checksums of the other files
    config.yaml, tokenizer.json
checkpoints/last, checkpoints/best -> step-...

Nothing is pickled. `last` and `best` are links on disk, and objects that hold the name in object
storage, which has no links.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from omni.checkpoint.train_state import TrainState
from omni.model.lm.lora import is_adapter
from omni.model.lm.pretrained import load_lm
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.storage.digest import digest, file_digest
from omni.storage.path import ObjectPath, StoragePath, raise_if_unreachable

FORMAT = 1
STATE_FILE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another kind; the message names file and reason."""


@dataclass(frozen=True)
class Checkpoint:
    """Parsed small files of a checkpoint; tensors are read on demand."""

    path: StoragePath
    state: TrainState
    model: OmniConfig
    encoder: dict[str, Any]
    """Source, mode, margin_seconds, dtype, layers and fingerprint of the encoder."""
    digests: dict[str, str]
    """Checksums of the other files, by name."""

    def load_model(self, frozen: torch.dtype | None = None) -> OmniModel:
        """Load the trained model on CPU in fp32.

        frozen: dtype of a pretrained language model that is stored by reference.
        Raises SourceError if that language model cannot be fetched.
        """
        weights = self.weights()
        whole = any(name.startswith("lm.") and not is_adapter(name) for name in weights)
        model = OmniModel(self.model, None if whole else load_lm(self.model, frozen))
        _, unexpected = model.load_state_dict(weights, strict=False)
        missing = [
            name
            for name, _ in model.named_parameters()
            if name not in weights and (whole or not name.startswith("lm.") or is_adapter(name))
        ]
        if missing or unexpected:
            raise CheckpointError(f"{self.path}: tensors missing {missing}, unknown {unexpected}")
        return model

    def weights(self) -> dict[str, Tensor]:
        return self._tensors("model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return self._tensors("optimizer.safetensors")

    def tokenizer(self) -> SpeechTokenizer:
        path = self.path / "tokenizer.json"
        try:
            return SpeechTokenizer.from_json(path.read_text(encoding="utf-8"))
        except Exception as error:  # The tokenizers library raises plain Exception.
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each stored weight, by name."""
        path = self.path / "model.safetensors"
        if isinstance(path, Path):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return {name: tuple(tensor.shape) for name, tensor in self.weights().items()}

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / name
        try:
            if isinstance(path, Path):
                return load_file(path)
            data = path.read_bytes()
            if digest(data, size=16) != self.digests[name]:
                raise CheckpointError(f"{path}: damaged (checksum differs)")
            return load(data)
        except (OSError, SafetensorError) as error:
            raise_if_unreachable(path, error)
            raise CheckpointError(f"{path}: damaged ({error})") from None


def read_checkpoint(path: StoragePath, *, verify: bool = False) -> Checkpoint:
    """Read and check a checkpoint folder (or a `last`/`best` link). Raises CheckpointError.

    verify: also compare the other files with their recorded checksums. In object storage only their
    sizes are compared here; checksums are compared when the tensors are read.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    path = link_target(path)
    try:
        document = json.loads((path / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise_if_unreachable(path, error)
        raise CheckpointError(f"{path}: {STATE_FILE} is missing or damaged ({error})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: {STATE_FILE} is not a checkpoint's")
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {document.get('format')!r}, this version reads {FORMAT}"
        )
    if document.pop("checksum", None) != document_digest(document):
        raise CheckpointError(f"{path}: {STATE_FILE} is damaged (checksum differs)")
    for name, expected in document["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if not verify:
            continue
        if isinstance(file, ObjectPath):
            # Checkpoints of older versions recorded no sizes.
            written = document.get("sizes", {}).get(name)
            if written is not None and file.stat().st_size != written:
                raise CheckpointError(f"{path}: {name} is damaged (size differs)")
        elif file_digest(file, size=16) != expected:
            raise CheckpointError(f"{path}: {name} is damaged (checksum differs)")
    return Checkpoint(
        path,
        TrainState(**document["state"]),
        OmniConfig.from_dict(document["model"]),
        document["encoder"],
        document["files"],
    )


def link_target(path: StoragePath) -> StoragePath:
    """Resolve `last` or `best` to the checkpoint it names; return any other path as it is."""
    if isinstance(path, Path):
        return path.resolve()
    return path.with_name(path.read_text()) if path.is_file() else path


def document_digest(document: dict[str, Any]) -> str:
    return digest(json.dumps(document, sort_keys=True), size=16)
