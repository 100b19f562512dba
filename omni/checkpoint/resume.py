"""Choose and verify the checkpoint that an attempt continues from."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from omni.checkpoint.checkpoint import STATE_FILE, Checkpoint, CheckpointError, read_checkpoint
from omni.checkpoint.retention import checkpoint_folders, checkpoint_path, step_of
from omni.storage.path import ObjectPath, StoragePath
from omni.storage.retry import retry_storage


@dataclass(frozen=True)
class ResumePoint:
    """Verified checkpoint that an attempt continues from.

    The driver chooses it once per attempt; the stream and all ranks start from it without looking
    again, so they cannot disagree and the weights are hashed once.
    """

    path: StoragePath
    step: int
    evaluations_since_best: int = 0

    @classmethod
    def of(cls, found: Checkpoint, run_dir: StoragePath) -> ResumePoint:
        # Nodes may mount the run directory under different names: no resolved path here.
        state = found.state
        path = checkpoint_path(run_dir / "checkpoints", state.step)
        return cls(path, state.step, state.evaluations_since_best)


def find_resume_point(run_dir: StoragePath) -> tuple[ResumePoint | None, list[str]]:
    """Verify the checkpoints of an existing run, newest first, until one is valid.

    Returns it, and the reasons why newer ones are not valid.
    Retries while storage is unavailable, then raises OSError: an unreachable folder taken for an
    empty one would restart the run from step 0.
    """

    def find() -> tuple[ResumePoint | None, list[str]]:
        damaged: list[str] = []
        _require_file(run_dir / "config.yaml")
        found = newest_checkpoint(run_dir / "checkpoints", damaged)
        _require_file(run_dir / "config.yaml")
        return None if found is None else ResumePoint.of(found, run_dir), damaged

    return retry_storage(find)


def newest_checkpoint(folder: StoragePath, damaged: list[str] | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that passes verification.

    damaged: gets the reasons of newer ones that do not; None prints them on stderr.
    """
    for path in reversed(checkpoint_folders(folder)):
        if isinstance(path, ObjectPath) and not (path / STATE_FILE).is_file():
            continue  # The upload of this checkpoint was interrupted.
        try:
            return read_checkpoint(path, verify=True)
        except CheckpointError as error:
            if damaged is None:
                print(f"omni: skipping damaged checkpoint {error}", file=sys.stderr, flush=True)
            else:
                damaged.append(str(error))
    return None


def newest_step(folder: StoragePath) -> int:
    """Return the step of the newest checkpoint without verifying it; 0 if there is none."""
    for path in reversed(checkpoint_folders(folder)):
        if isinstance(path, Path) or (path / STATE_FILE).is_file():
            return step_of(path)
    return 0


def _require_file(file: StoragePath) -> None:
    if isinstance(file, Path):
        os.stat(file)
    elif not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such object", str(file))
