"""Write a checkpoint whole or not at all.

On disk it is written under another name and renamed. Object storage cannot rename: there state.json
is written last and deleted first, so that a folder without it is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from omni.checkpoint.checkpoint import FORMAT, SHARDED_FORMAT, STATE_FILE, document_digest
from omni.checkpoint.retention import checkpoint_path, set_link, staging_path
from omni.checkpoint.tensor_files import Rows, save_tensors
from omni.checkpoint.train_state import TrainState
from omni.model.speech_lm import OmniConfig
from omni.storage.digest import file_digest
from omni.storage.fence import check_fence, lease_number
from omni.storage.path import ObjectPath, StoragePath, remove_tree

Parts = Mapping[str, Tensor | Rows]
"""Tensors and rows of tensors that one rank writes, by name."""


@dataclass(frozen=True)
class Facts:
    """Facts of a checkpoint beside its tensors."""

    state: TrainState
    model: OmniConfig
    encoder: dict[str, Any]
    config_yaml: str
    tokenizer_json: str


@dataclass(frozen=True)
class WrittenFiles:
    """Checksums and bytes of the files that a rank has written, by name."""

    digests: dict[str, str]
    sizes: dict[str, int]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> WrittenFiles:
        return cls(
            {path.name: file_digest(path, size=16) for path in paths},
            {path.name: path.stat().st_size for path in paths},
        )


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
    facts = Facts(state, model, encoder, config_yaml, tokenizer_json)
    with _staging_folder(final) as staging:
        save_tensors(weights, staging / "model.safetensors")
        save_tensors(optimizer, staging / "optimizer.safetensors")
        _write_facts(staging, final, facts, FORMAT, [])
    set_link(folder / "last", final)
    return final


# -- by several ranks --------------------------------------------------------------------------
#
# Rank 0 clears the way, every rank writes its files, and rank 0 publishes, each after all ranks
# have done what comes before (see `omni.checkpoint.sharded_writer`).


def clear_parts(folder: StoragePath, step: int) -> None:
    """Make room for the files of all ranks. Raises OSError and LeaseLost."""
    final = checkpoint_path(folder, step)
    check_fence(final, fresh=True)
    if isinstance(final, ObjectPath):
        (final / STATE_FILE).unlink(missing_ok=True)
        remove_tree(final)
        return
    staging = staging_path(final)
    remove_tree(staging)
    staging.mkdir(parents=True)


def write_parts(
    folder: StoragePath, step: int, rank: int, weights: Parts, optimizer: Parts
) -> WrittenFiles:
    """Write the files of one rank beside those of the others. Raises OSError and LeaseLost."""
    final = checkpoint_path(folder, step)
    with contextlib.ExitStack() as stack:
        if isinstance(final, ObjectPath):
            prefix = "omni-checkpoint-"
            staging = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        else:
            staging = _on_disk(staging_path(final))
        paths = []
        for part, tensors in (("model", weights), ("optimizer", optimizer)):
            paths.append(staging / f"{part}.rank-{rank:04d}.safetensors")
            save_tensors(tensors, paths[-1])
        written = WrittenFiles.of(paths)
        for path in paths:
            check_fence(final, fresh=True)
            if isinstance(final, ObjectPath):
                (final / path.name).upload(path)
            else:
                _sync(path)
    return written


def publish_parts(folder: StoragePath, facts: Facts, parts: Sequence[WrittenFiles]) -> StoragePath:
    """Make one checkpoint of the files of all ranks; see `save_checkpoint`."""
    final = checkpoint_path(folder, facts.state.step)
    for written in parts:
        for name, size in written.sizes.items():
            place = (final if isinstance(final, ObjectPath) else staging_path(final)) / name
            if place.stat().st_size != size:
                raise OSError(None, f"expected {size} bytes, as a rank has written", str(place))
    if isinstance(final, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="omni-checkpoint-") as name:
            _write_facts(Path(name), final, facts, SHARDED_FORMAT, parts)
            _upload(Path(name), final)
    else:
        staging = _on_disk(staging_path(final))
        _write_facts(staging, final, facts, SHARDED_FORMAT, parts)
        _rename(staging, _on_disk(final))
    set_link(folder / "last", final)
    return final


# -- files -------------------------------------------------------------------------------------


def _write_facts(
    staging: Path,
    final: StoragePath,
    facts: Facts,
    number: int,
    parts: Sequence[WrittenFiles],
) -> None:
    """Write everything but tensors. parts: files that are not in `staging`, or have checksums."""
    (staging / "config.yaml").write_text(facts.config_yaml)
    (staging / "tokenizer.json").write_text(facts.tokenizer_json)
    known = {name for written in parts for name in written.sizes}
    own = WrittenFiles.of([path for path in sorted(staging.iterdir()) if path.name not in known])
    every = [*parts, own]
    document = {
        "format": number,
        "state": asdict(facts.state),
        "model": facts.model.to_dict(),
        "encoder": facts.encoder,
        "files": {name: value for written in every for name, value in written.digests.items()},
        "sizes": {name: value for written in every for name, value in written.sizes.items()},
    }
    if (lease := lease_number(final)) is not None:
        document["lease"] = lease
    document["checksum"] = document_digest(document)
    (staging / STATE_FILE).write_text(json.dumps(document, indent=1))


@contextlib.contextmanager
def _staging_folder(final: StoragePath) -> Iterator[Path]:
    """Yield an empty folder on disk; publish its files as `final` on leaving the context."""
    if isinstance(final, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="omni-checkpoint-") as name:
            yield Path(name)
            check_fence(final, fresh=True)
            (final / STATE_FILE).unlink(missing_ok=True)
            _upload(Path(name), final)
        return
    temporary = _on_disk(staging_path(final))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    _rename(temporary, _on_disk(final))


def _upload(folder: Path, final: ObjectPath) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE_FILE):
        check_fence(final, fresh=True)
        (final / path.name).upload(path)


def _rename(staging: Path, final: Path) -> None:
    for path in staging.iterdir():
        _sync(path)
    check_fence(final, fresh=True)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staging, final)
    _sync(final.parent)


def _on_disk(path: StoragePath) -> Path:
    assert isinstance(path, Path)
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
