"""Start a run from the trained weights of another: omni-tiny, or any checkpoint.

omni/assets/omni-tiny is a checkpoint like those of a run, without optimizer state and in bf16.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from omni.checkpoint.checkpoint import (
    FORMAT,
    STATE_FILE,
    Checkpoint,
    CheckpointError,
    document_digest,
    read_checkpoint,
)
from omni.checkpoint.tensor_files import TensorFiles
from omni.checkpoint.train_state import TrainState
from omni.config.field_types import OMNI_TINY
from omni.model.lm.lora import is_adapter
from omni.model.speech_lm import OmniConfig
from omni.storage.digest import file_digest
from omni.storage.path import StoragePath, as_path

_FOLDER = Path(__file__).parents[1] / "assets" / OMNI_TINY
_SECTIONS = ("encoder", "tokenizer", "model", "optim", "eval")
"""Sections of a run's config that say nothing of where it ran."""
_PARTS = {
    "data": (
        *("template", "prompt", "tasks"),
        *("language", "language_tag", "unicode", "case", "punctuation"),
    ),
    "train": ("precision",),
}
"""Settings of other sections that decoding needs."""
_PARTS_THAT_BEGIN_ANEW = ("ctc_head.", "summary.", "mix.")
"""Weights of a model that its base may lack."""


def checkpoint_folder(name: str) -> StoragePath:
    """Return the folder of a checkpoint: omni-tiny, a checkpoint, or a run's best one."""
    if name == OMNI_TINY:
        return _FOLDER
    path = as_path(name)
    best = path / "checkpoints" / "best"
    try:
        return best if best.is_dir() else path
    except OSError:  # Reading the checkpoint says what is wrong with its storage.
        return path


def read_base(name: str) -> Checkpoint:
    """Read the checkpoint that `model.base` names. Raises CheckpointError."""
    return read_checkpoint(checkpoint_folder(name), verify=True)


def resolved_name(base: Checkpoint, name: str) -> str:
    """Return a name that will mean the same checkpoint when the run that `name` means goes on."""
    return name if name == OMNI_TINY else str(base.path)


def has_language_model(base: Checkpoint) -> bool:
    """Tell whether a base stores a whole language model, and does not refer to a published one."""
    return any(name.startswith("lm.") and not is_adapter(name) for name in base.shapes())


def differences(base: OmniConfig, run: OmniConfig) -> list[str]:
    """Describe settings that the weights of `base` do not fit, each as "field: has X, expected Y".

    Dropouts may differ; a CTC head, and summary tokens, that only one of them has are left out, or
    begin anew. A base of the last encoder layer may get others beside it.
    """
    given, wanted = _shape(run), _shape(base)
    if base.layers == 1:
        del wanted["model.layers"]
    return [
        f"{name}: {given.get(name)}; expected {wanted[name]}"
        for name in wanted
        if given.get(name) != wanted[name]
    ]


def _shape(config: OmniConfig) -> dict[str, Any]:
    values = config.to_dict()
    language_model = dict(values.pop("lm"))
    if set(language_model.get("window_pattern", "")) == {"L"}:
        # Positions are rotary: without short windows, weights serve any length.
        language_model.pop("sequence_len")
    free = ("dropout", "token_dropout", "audio_dropout", "ctc", "summary_tokens")
    return {
        **{f"model.{name}": value for name, value in language_model.items()},
        **{f"model.{name}": value for name, value in values.items() if name not in free},
    }


@dataclass(frozen=True)
class InitialWeights:
    """Weights of a base that a run starts from."""

    files: TensorFiles
    names: list[str]


@contextlib.contextmanager
def initial_weights(base: Checkpoint, names: Mapping[str, torch.Size]) -> Iterator[InitialWeights]:
    """Open the base's weights of the parameters `names`, with their shapes.

    Those of a published language model to which the base refers are not among them. Raises
    CheckpointError where one is missing, other than those of parts that a base may lack.
    """
    with base.open_weights() as files:
        yield InitialWeights(files, _fitting(base, files.shapes, names))


def _fitting(
    base: Checkpoint, weights: Mapping[str, tuple[int, ...]], names: Mapping[str, torch.Size]
) -> list[str]:
    whole = has_language_model(base)
    missing = [
        name
        for name in names
        if name not in weights
        and not name.startswith(_PARTS_THAT_BEGIN_ANEW)
        and (whole or not name.startswith("lm.") or is_adapter(name))
    ]
    odd = [n for n, shape in names.items() if n in weights and weights[n] != tuple(shape)]
    if missing or odd:
        raise CheckpointError(
            f"{base.path}: tensors missing {missing}, of another shape {odd}; expected a base of "
            "the same model"
        )
    return [name for name in names if name in weights]


def write_base(found: Checkpoint, out: Path) -> None:
    """Write a checkpoint without optimizer state, in bf16 and without the paths of its run."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in found.weights().items()}
    save_file(weights, out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)  # The library writes files for their owner alone.
    config = yaml.safe_load((found.path / "config.yaml").read_text())
    kept = {name: config[name] for name in _SECTIONS if name in config}
    for section, names in _PARTS.items():
        kept[section] = {n: config[section][n] for n in names if n in config[section]}
    kept["model"]["base"] = kept["tokenizer"]["path"] = None  # Weights and tokenizer are here.
    (out / "config.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    (out / "tokenizer.json").write_text((found.path / "tokenizer.json").read_text())
    paths = [out / name for name in ("config.yaml", "model.safetensors", "tokenizer.json")]
    document = {
        "format": FORMAT,
        "state": asdict(TrainState(step=found.state.step, epoch=found.state.epoch)),
        "model": found.model.to_dict(),
        "encoder": found.encoder,
        "files": {path.name: file_digest(path, size=16) for path in paths},
        "sizes": {path.name: path.stat().st_size for path in paths},
    }
    document["checksum"] = document_digest(document)
    (out / STATE_FILE).write_text(json.dumps(document, indent=1))
