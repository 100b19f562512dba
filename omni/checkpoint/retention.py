"""Name checkpoints by step, link `last` and `best`, and remove old checkpoints."""

from __future__ import annotations

import os

from omni.checkpoint.checkpoint import STATE_FILE, link_target
from omni.storage.fence import check_fence, lease_number
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


def staging_path(final: StoragePath) -> StoragePath:
    """Return the name under which a checkpoint is written before it is published."""
    return final.with_name(f".{final.name}{_lease_mark(final)}.tmp")


def remove_staging(folder: StoragePath) -> None:
    """Remove what earlier leases left of checkpoints that they did not publish.

    A process that was stopped in the middle of one then finds nothing to publish when it goes on.
    """
    mine = f"{_lease_mark(folder)}.tmp"
    found: list[StoragePath] = [*folder.glob(f".{_PREFIX}*.tmp")]
    for path in found:
        if not path.name.endswith(mine):
            remove_tree(path)


def _lease_mark(path: StoragePath) -> str:
    number = lease_number(path)
    return "" if number is None else f".lease-{number:06d}"


def set_link(link: StoragePath, target: StoragePath) -> None:
    """Make `link` name a checkpoint beside it, atomically."""
    check_fence(link, fresh=True)
    if isinstance(link, ObjectPath):
        link.write_text(target.name)
        return
    temporary = link.with_name(f".{link.name}{_lease_mark(link)}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def prune_checkpoints(folder: StoragePath, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the targets of `last` and `best`."""
    check_fence(folder, fresh=True)
    links = [folder / name for name in ("last", "best")]
    linked = {link_target(link).name for link in links if link.exists()}
    for path in checkpoint_folders(folder)[:-keep]:
        if path.name not in linked:
            if isinstance(path, ObjectPath):
                (path / STATE_FILE).unlink(missing_ok=True)
            remove_tree(path)
