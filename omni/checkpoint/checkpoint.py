"""Checkpoints: written whole or not at all, verified when read, without pickle.

checkpoints/step-000400/
    model.safetensors      the model's weights (averaged, where an average is kept)
    optimizer.safetensors  optimizer state, and the raw weights beside an average
    state.json             where the plan stands, fingerprints, checksums of the other files
    config.yaml, tokenizer.json
checkpoints/last, checkpoints/best -> step-...

On disk a checkpoint is written under another name and renamed, and last and best are links. In
object storage, which has neither, state.json is written last and deleted first, and last and best
are objects that hold the name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from omni.model.lm.lora import is_adapter
from omni.model.lm.pretrained import load_lm
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.storage.path import ObjectPath, StoragePath, raise_if_unreachable, remove_tree
from omni.storage.retry import retry_storage

_FORMAT = 1
_STATE = "state.json"


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
    folder: StoragePath,
    *,
    state: TrainState,
    model: OmniConfig,
    encoder: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    config_yaml: str,
    tokenizer_json: str,
) -> StoragePath:
    """Write folder/step-NNNNNN whole, then move `last`.

    Raises OSError, and leaves nothing behind that could be taken for a checkpoint.
    """
    final = folder / f"step-{state.step:06d}"
    with _made_for(final) as made:
        _save_tensors(weights, made / "model.safetensors")
        _save_tensors(optimizer, made / "optimizer.safetensors")
        (made / "config.yaml").write_text(config_yaml)
        (made / "tokenizer.json").write_text(tokenizer_json)
        paths = sorted(made.iterdir())
        document = {
            "format": _FORMAT,
            "state": asdict(state),
            "model": model.to_dict(),
            "encoder": encoder,
            "files": {path.name: _digest(path) for path in paths},
            "sizes": {path.name: path.stat().st_size for path in paths},
        }
        document["checksum"] = _text_digest(document)
        (made / _STATE).write_text(json.dumps(document, indent=1))
    point(folder / "last", final)
    return final


@contextlib.contextmanager
def _made_for(final: StoragePath) -> Iterator[Path]:
    """A folder to fill; what is in it then appears as `final`, whole."""
    if isinstance(final, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="omni-checkpoint-") as name:
            yield Path(name)
            (final / _STATE).unlink(missing_ok=True)
            paths = sorted(Path(name).iterdir(), key=lambda path: path.name == _STATE)
            for path in paths:
                (final / path.name).upload(path)
        return
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.iterdir():
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(final.parent)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, path)
    except SafetensorError as error:  # what the disk said stands in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def point(link: StoragePath, target: StoragePath) -> None:
    """Make `link` name a checkpoint beside it, atomically."""
    if isinstance(link, ObjectPath):
        link.write_text(target.name)
        return
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def _pointed(path: StoragePath) -> StoragePath:
    """The checkpoint that `last` or `best` names; any other path as it is."""
    if isinstance(path, Path):
        return path.resolve()
    return path.with_name(path.read_text()) if path.is_file() else path


def newest_checkpoint(folder: StoragePath, damaged: list[str] | None = None) -> StoragePath | None:
    """The newest checkpoint that is whole; what is wrong with newer ones goes to `damaged`, or to
    stderr.
    """
    for path in reversed(_by_step(folder)):
        if isinstance(path, ObjectPath) and not (path / _STATE).is_file():
            continue  # an upload that did not come to its end
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


def newest_step(folder: StoragePath) -> int:
    """The step of the newest checkpoint, unverified; 0 without one."""
    for path in reversed(_by_step(folder)):
        if isinstance(path, Path) or (path / _STATE).is_file():
            return _step_of(path)
    return 0


def resume_point(run_dir: StoragePath, damaged: list[str] | None = None) -> StoragePath | None:
    """The checkpoint that an attempt at an existing run begins from.

    Waits for storage that is away, and raises OSError in the end: taking it for an empty folder
    would begin the run anew.
    """

    def look() -> StoragePath | None:
        _must_be_there(run_dir / "config.yaml")
        path = newest_checkpoint(run_dir / "checkpoints", damaged)
        _must_be_there(run_dir / "config.yaml")
        return path

    return retry_storage(look)


def _must_be_there(file: StoragePath) -> None:
    if isinstance(file, Path):
        os.stat(file)
    elif not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such object", str(file))


def prune(folder: StoragePath, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and those that `last` and `best` name."""
    named = {_pointed(folder / name).name for name in ("last", "best") if (folder / name).exists()}
    for path in _by_step(folder)[:-keep]:
        if path.name not in named:
            if isinstance(path, ObjectPath):
                (path / _STATE).unlink(missing_ok=True)
            remove_tree(path)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's small files, read."""

    path: StoragePath
    state: TrainState
    model: OmniConfig
    encoder: dict[str, Any]  # source, mode, margin_seconds, dtype, fingerprint
    digests: dict[str, str]  # of the other files

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
            return SpeechTokenizer.from_json(path.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / name
        try:
            if isinstance(path, Path):
                return load_file(path)
            data = path.read_bytes()
            if hashlib.blake2b(data, digest_size=16).hexdigest() != self.digests[name]:
                raise CheckpointError(f"{path}: damaged (checksum differs)")
            return load(data)
        except (OSError, SafetensorError) as error:
            raise_if_unreachable(path, error)
            raise CheckpointError(f"{path}: damaged ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights, by name."""
        path = self.path / "model.safetensors"
        if isinstance(path, Path):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return {name: tuple(tensor.shape) for name, tensor in self.weights().items()}


def read_state(path: StoragePath, *, verify: bool = False) -> Checkpoint:
    """Read and check a checkpoint folder (or a `last`/`best` link). Raises CheckpointError.

    verify: also that its files are what was written. In object storage that is their sizes; what
    is read of them is compared with its checksum then.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    path = _pointed(path)
    try:
        document = json.loads((path / _STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise_if_unreachable(path, error)
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
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if not verify:
            continue
        if isinstance(file, ObjectPath):
            written = document.get("sizes", {}).get(name)  # older versions kept none
            if written is not None and file.info().size != written:
                raise CheckpointError(f"{path}: {name} is damaged (size differs)")
        elif _digest(file) != expected:
            raise CheckpointError(f"{path}: {name} is damaged (checksum differs)")
    return Checkpoint(
        path,
        TrainState(**document["state"]),
        OmniConfig.from_dict(document["model"]),
        document["encoder"],
        document["files"],
    )


def _by_step(folder: StoragePath) -> list[StoragePath]:
    """Checkpoint folders, oldest first."""
    numbered = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(numbered, key=_step_of)


def _step_of(path: StoragePath) -> int:
    return int(path.name.removeprefix("step-"))


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
