"""Write a checkpoint whole or not at all.

On disk it is written under another name and renamed. Object storage cannot rename: there state.json
is written last and deleted first, so that a folder without it is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from omni.checkpoint.checkpoint import FORMAT, STATE_FILE, document_digest
from omni.checkpoint.retention import checkpoint_path, set_link, staging_path
from omni.checkpoint.train_state import TrainState
from omni.model.speech_lm import OmniConfig
from omni.storage.digest import file_digest
from omni.storage.fence import check_fence, lease_number
from omni.storage.path import ObjectPath, StoragePath


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
    """Write folder/step-NNNNNN, then move the link `last` to it; return its path.

    Raises OSError, and leaves nothing behind that could be taken for a checkpoint. Raises LeaseLost
    and publishes nothing if another driver has taken the run over.
    """
    final = checkpoint_path(folder, state.step)
    with _staging_folder(final) as staging:
        _save_tensors(weights, staging / "model.safetensors")
        _save_tensors(optimizer, staging / "optimizer.safetensors")
        (staging / "config.yaml").write_text(config_yaml)
        (staging / "tokenizer.json").write_text(tokenizer_json)
        paths = sorted(staging.iterdir())
        document = {
            "format": FORMAT,
            "state": asdict(state),
            "model": model.to_dict(),
            "encoder": encoder,
            "files": {path.name: file_digest(path, size=16) for path in paths},
            "sizes": {path.name: path.stat().st_size for path in paths},
        }
        if (number := lease_number(final)) is not None:
            document["lease"] = number
        document["checksum"] = document_digest(document)
        (staging / STATE_FILE).write_text(json.dumps(document, indent=1))
    set_link(folder / "last", final)
    return final


@contextlib.contextmanager
def _staging_folder(final: StoragePath) -> Iterator[Path]:
    """Yield an empty folder on disk; publish its files as `final` on leaving the context."""
    if isinstance(final, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="omni-checkpoint-") as name:
            yield Path(name)
            check_fence(final, fresh=True)
            (final / STATE_FILE).unlink(missing_ok=True)
            paths = sorted(Path(name).iterdir(), key=lambda path: path.name == STATE_FILE)
            for path in paths:
                check_fence(final, fresh=True)
                (final / path.name).upload(path)
        return
    temporary = staging_path(final)
    assert isinstance(temporary, Path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.iterdir():
        _sync(path)
    check_fence(final, fresh=True)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(final.parent)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, path)
    except SafetensorError as error:
        # The library keeps the errno in its text only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
