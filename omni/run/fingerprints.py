"""Refuse to continue a run with other data, plan or model than it began with."""

from __future__ import annotations

import torch

from omni.checkpoint.checkpoint import Checkpoint
from omni.errors import ConfigError
from omni.model.speech_lm import OmniModel
from omni.run.prepare import Prepared


def check_fingerprints(prepared: Prepared, saved: dict[str, str]) -> list[str]:
    """Compare the fingerprints of a run with the `saved` ones of its checkpoint.

    Returns those that differ and are allowed to by `run.override_fingerprint`. Raises ConfigError,
    which names them, for any other difference.
    """
    config = prepared.config
    # Runs of versions without augmentation have no fingerprint of it, and no augmentation.
    changed = [
        name for name, value in prepared.fingerprints.items() if saved.get(name, "") != value
    ]
    # Other data or another tokenizer makes other token ids; older runs have no fingerprint of them.
    if "tokens" in changed and ("tokens" not in saved or {"data.train", "tokenizer"} & {*changed}):
        changed.remove("tokens")
    refused = [name for name in changed if name not in config.run.override_fingerprint]
    if refused:
        flags = " ".join(f"--run.override_fingerprint {name}" for name in refused)
        raise ConfigError(
            f"run.name: {config.run_dir} was trained with another {', '.join(refused)}; choose "
            f"another run.name, remove that folder to start over, or continue anyway with {flags}"
        )
    if "model" in changed and prepared.resume is not None:
        _check_shapes(prepared, prepared.resume)
    return changed


def _check_shapes(prepared: Prepared, checkpoint: Checkpoint) -> None:
    """Raise ConfigError, naming a tensor, where shapes differ; dropouts may."""
    with torch.device("meta"):
        whole = OmniModel(prepared.model)
    whole.train_parts(prepared.config.model.train)
    wanted = {
        name: tuple(p.shape)
        for name, p in whole.named_parameters()
        if not whole.kept_by_reference(name)
    }
    held = checkpoint.shapes()
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            raise ConfigError(
                f"run.override_fingerprint model: {name} is {held.get(name, 'absent')} in "
                f"{checkpoint.path} and {wanted.get(name, 'absent')} in this configuration"
            )
