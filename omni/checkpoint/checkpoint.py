"""Read a checkpoint and verify that its files are those that were written.

checkpoints/step-000400/
    model.safetensors      weights of the model (averaged, where an average is kept)
    optimizer.safetensors  optimizer state, and the raw weights beside an average
    state.json             training state, fingerprints, checksums of the other files
    config.yaml, tokenizer.json
checkpoints/last, checkpoints/best -> step-...

Ranks of a sharded model each write their rows of the tensors, as model.rank-0000.safetensors and
optimizer.rank-0000.safetensors (see `omni.checkpoint.tensor_files`); state.json has the checksums
of all of them.

Nothing is pickled. `last` and `best` are links on disk, and objects that hold the name in object
storage, which has no links.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from omni.checkpoint.tensor_files import CheckpointError as CheckpointError
from omni.checkpoint.tensor_files import TensorFiles
from omni.checkpoint.train_state import TrainState
from omni.model.lm.lora import is_adapter
from omni.model.lm.pretrained import load_lm
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.storage.digest import digest, file_digest
from omni.storage.path import ObjectPath, StoragePath, raise_if_unreachable

FORMAT = 1
SHARDED_FORMAT = 2
"""Format of checkpoints whose tensors are split by rows over the files of several ranks."""
STATE_FILE = "state.json"


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
        """Read all weights into memory."""
        return self._tensors("model")

    def optimizer(self) -> dict[str, Tensor]:
        """Read all optimizer state into memory."""
        return self._tensors("optimizer")

    def open_weights(self) -> TensorFiles:
        """Open the weights, to read some of them or rows of them. Raises CheckpointError."""
        return self._open("model")

    def open_optimizer(self) -> TensorFiles:
        """Open the optimizer state; see `open_weights`."""
        return self._open("optimizer")

    def tokenizer(self) -> SpeechTokenizer:
        path = self.path / "tokenizer.json"
        try:
            return SpeechTokenizer.from_json(path.read_text(encoding="utf-8"))
        except Exception as error:  # The tokenizers library raises plain Exception.
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each stored weight, by name."""
        with self.open_weights() as weights:
            return weights.shapes

    def _open(self, part: str) -> TensorFiles:
        names = [name for name in self.digests if part_of(name) == part]
        if not names:
            raise CheckpointError(f"{self.path}: it has no {part}.safetensors")
        return TensorFiles([self.path / name for name in sorted(names)], self.digests)

    def _tensors(self, part: str) -> dict[str, Tensor]:
        name = f"{part}.safetensors"
        if any(part_of(other) == part for other in self.digests.keys() - {name}):
            with self._open(part) as files:
                return {name: files.whole(name) for name in files.shapes}
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
    if document.get("format") not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(
            f"{path}: format {document.get('format')!r}, this version reads {FORMAT} and "
            f"{SHARDED_FORMAT}"
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


def part_of(name: str) -> str | None:
    """Return `model` or `optimizer` for a file of tensors, whole ones or the rows of a rank."""
    part, _, rest = name.partition(".")
    ranks = rest.removesuffix(".safetensors")
    whole = rest == "safetensors"
    return part if whole or (ranks != rest and ranks.startswith("rank-")) else None


def document_digest(document: dict[str, Any]) -> str:
    return digest(json.dumps(document, sort_keys=True), size=16)
