"""Name checkpoints by step, link `last` and `best`, and remove old checkpoints."""

from __future__ import annotations

import os

from omni.checkpoint.checkpoint import STATE_FILE, link_target
from omni.storage.path import ObjectPath, StoragePath, remove_tree

_PREFIX = "step-"


def checkpoint_path(folder: StoragePath, step: int) -> StoragePath:
    return folder / f"{_PREFIX}{step:06d}"


def step_of(path: StoragePath) -> int:
    return int(path.name.removeprefix(_PREFIX))


def checkpoint_folders(folder: StoragePath) -> list[StoragePath]:
    """List the checkpoint folders in `folder`, oldest first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def set_link(link: StoragePath, target: StoragePath) -> None:
    """Make `link` name a checkpoint beside it, atomically."""
    if isinstance(link, ObjectPath):
        link.write_text(target.name)
        return
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def prune_checkpoints(folder: StoragePath, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the targets of `last` and `best`."""
    links = [folder / name for name in ("last", "best")]
    linked = {link_target(link).name for link in links if link.exists()}
    for path in checkpoint_folders(folder)[:-keep]:
        if path.name not in linked:
            if isinstance(path, ObjectPath):
                (path / STATE_FILE).unlink(missing_ok=True)
            remove_tree(path)
