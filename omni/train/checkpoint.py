"""Checkpoints: written whole or not at all, verified when read, without pickle.

checkpoints/step-000400/
    model.safetensors      the model's weights (averaged, where an average is kept)
    optimizer.safetensors  optimizer state, and the raw weights beside an average
    state.json             where the plan stands, fingerprints, checksums of the other files
    config.yaml, tokenizer.json
checkpoints/last, checkpoints/best -> step-...
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni.model.lora import is_adapter
from omni.model.omni import OmniConfig, OmniModel
from omni.model.pretrained import load_lm
from omni.model.tokenizer import SpeechTokenizer
from omni.retry import patiently

_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another kind; the message names file and reason."""


@dataclass
class TrainState:
    """Where a run stands. `bins_consumed` is the whole resume state of the data."""

    step: int = 0
    bins_consumed: int = 0
    epoch: float = 0.0
    seconds: float = 0.0  # spent training, over all attempts
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    mean_norm: float = 0.0  # of the gradients of `updates` updates, with a memory of about 50
    updates: int = 0
    skipped: int = 0  # steps without an update
    skipped_in_row: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)  # of index, plan, tokenizer, ...
    rejects: dict[str, int] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    *,
    state: TrainState,
    model: OmniConfig,
    encoder: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    config_yaml: str,
    tokenizer_json: str,
) -> Path:
    """Write folder/step-NNNNNN under a temporary name, then rename it and move `last`.

    Raises OSError, and leaves nothing behind that could be taken for a checkpoint.
    """
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save_tensors(weights, temporary / "model.safetensors")
    _save_tensors(optimizer, temporary / "optimizer.safetensors")
    (temporary / "config.yaml").write_text(config_yaml)
    (temporary / "tokenizer.json").write_text(tokenizer_json)
    files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    document = {
        "format": _FORMAT,
        "state": asdict(state),
        "model": model.to_dict(),
        "encoder": encoder,
        "files": files,
    }
    document["checksum"] = _text_digest(document)
    (temporary / "state.json").write_text(json.dumps(document, indent=1))
    for path in temporary.iterdir():
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(folder)
    point(folder / "last", final)
    return final


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, path)
    except SafetensorError as error:  # what the disk said stands in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def point(link: Path, target: Path) -> None:
    """Make `link` name a checkpoint beside it, atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def newest_checkpoint(folder: Path, damaged: list[str] | None = None) -> Path | None:
    """The newest checkpoint that is whole; what is wrong with newer ones goes to `damaged`, or to
    stderr.
    """
    for path in reversed(_by_step(folder)):
        try:
            read_state(path, verify=True)
        except CheckpointError as error:
            if damaged is None:
                print(f"omni: passing over {error}", file=sys.stderr, flush=True)
            else:
                damaged.append(str(error))
            continue
        return path
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, unverified; 0 without one."""
    found = _by_step(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def resume_point(run_dir: Path, damaged: list[str] | None = None) -> Path | None:
    """The checkpoint that an attempt at an existing run begins from.

    Waits for storage that is away, and raises OSError in the end: taking it for an empty folder
    would begin the run anew.
    """

    def look() -> Path | None:
        os.stat(run_dir / "config.yaml")
        path = newest_checkpoint(run_dir / "checkpoints", damaged)
        os.stat(run_dir / "config.yaml")
        return path

    return patiently(look)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and those that `last` and `best` name."""
    named = {
        (folder / name).resolve().name for name in ("last", "best") if (folder / name).exists()
    }
    for path in _by_step(folder)[:-keep]:
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's small files, read."""

    path: Path
    state: TrainState
    model: OmniConfig
    encoder: dict[str, Any]  # source, mode, margin_seconds, dtype, fingerprint

    def load_model(self, frozen: torch.dtype | None = None) -> OmniModel:
        """The trained model on CPU in fp32, and in `frozen` what it has by reference.

        Raises SourceError where a pretrained language model cannot be had.
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
            return SpeechTokenizer.load(path)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / name}: damaged ({error})") from None


def read_state(path: Path, *, verify: bool = False) -> Checkpoint:
    """Read and check a checkpoint folder (or a `last`/`best` link). Raises CheckpointError."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    path = path.resolve()
    try:
        document = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: state.json is missing or damaged ({error})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: state.json is not a checkpoint's")
    if document.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: format {document.get('format')!r}, this version reads {_FORMAT}"
        )
    if document.pop("checksum", None) != _text_digest(document):
        raise CheckpointError(f"{path}: state.json is damaged (checksum differs)")
    for name, expected in document["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if verify and _digest(path / name) != expected:
            raise CheckpointError(f"{path}: {name} is damaged (checksum differs)")
    return Checkpoint(
        path,
        TrainState(**document["state"]),
        OmniConfig.from_dict(document["model"]),
        document["encoder"],
    )


def _by_step(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    numbered = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")))


def _text_digest(document: dict[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
