"""Save the input of a windowed plan in the run's directory, and what is known of its windows.

plan/FINGERPRINT.json            seed, sizes, and the prepared parts, which hold ids and positions
plan/FINGERPRINT.windows.jsonl   bins of each window that has been planned, in order
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni.config import Config
from omni.metrics.run_files import append_json, read_json_lines, write_bytes
from omni.plan.part_files import PartFiles, lengths_digest
from omni.plan.window_reader import WindowReader
from omni.plan.windows import PartLengths, Parts, Windows
from omni.storage.path import StoragePath


@dataclass(frozen=True)
class WindowsFile:
    """Input of `Windows`, and the files that its lengths are read from."""

    parts: Parts
    files: PartFiles
    index_fingerprint: str
    seed: int
    bin_positions: int
    bins_per_step: int
    window_utterances: int

    def windows(self) -> Windows:
        """Make the plan again. Reading lengths that have changed raises ValueError."""
        return Windows(
            self.parts,
            self._lengths,
            seed=self.seed,
            bin_positions=self.bin_positions,
            window_utterances=self.window_utterances,
        )

    def _lengths(self, part: int) -> PartLengths:
        found = self.files.lengths(part)
        at_speed, names = None, np.zeros(0, np.uint64)
        if found.speeds is not None:
            at_speed, names = found.speeds.positions, found.speeds.names
        if lengths_digest(found.natural, at_speed, names) != self.parts.digests[part]:
            raise ValueError(f"{self.files.path(part)}: it holds other positions than were planned")
        return found


def windows_path(run_dir: StoragePath, fingerprint: str) -> StoragePath:
    return run_dir / "plan" / f"{fingerprint}.json"


def write_windows_file(
    config: Config, fingerprint: str, index_fingerprint: str, reader: WindowReader
) -> None:
    """Write the input of the training split's plan, unless the file exists."""
    path = windows_path(config.run_dir, fingerprint)
    if path.is_file():
        return
    parts, files = reader.windows.parts, reader.files
    facts: dict[str, Any] = {
        "index_fingerprint": index_fingerprint,
        "seed": config.run.seed,
        "bin_positions": config.optim.bin_positions,
        "bins_per_step": config.optim.bins_per_step,
        "window_utterances": config.data.window_utterances,
        "weights": parts.weights,
        "speeds": files.speeds,
        "rows": parts.rows.tolist(),
        "usable": parts.usable.tolist(),
        "positions": parts.positions.tolist(),
        "sources": parts.sources.tolist(),
        "digests": parts.digests,
        "paths": [files.path(part) for part in range(len(files))],
    }
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, json.dumps(facts).encode())


def read_windows_file(path: StoragePath, tasks: Sequence[str] = ()) -> WindowsFile:
    """Read the input of a windowed plan.

    tasks: names of the tasks of the run, for its rows. Raises OSError for a missing file,
    ValueError, KeyError or TypeError for one that is damaged.
    """
    facts = json.loads(path.read_bytes())
    parts = Parts(
        rows=np.asarray(facts["rows"], np.int64),
        usable=np.asarray(facts["usable"], np.int64),
        sources=np.asarray(facts["sources"], np.int64),
        positions=np.asarray(facts["positions"], np.int64),
        weights=tuple(facts["weights"]),
        digests=tuple(facts["digests"]),
    )
    speeds = None if facts["speeds"] is None else tuple(facts["speeds"])
    files = PartFiles(facts["paths"], parts.starts, seed=facts["seed"], speeds=speeds, tasks=tasks)
    names = ("index_fingerprint", "seed", "bin_positions", "bins_per_step", "window_utterances")
    return WindowsFile(parts, files, **{name: facts[name] for name in names})


def _bins_path(run_dir: StoragePath, fingerprint: str) -> StoragePath:
    return run_dir / "plan" / f"{fingerprint}.windows.jsonl"


def read_window_bins(run_dir: StoragePath, fingerprint: str) -> list[int]:
    """Read the bins of the first windows of a plan, as far as they have been planned before."""
    found: dict[int, int] = {}
    for row in read_json_lines(_bins_path(run_dir, fingerprint)):
        if isinstance(row.get("window"), int) and isinstance(row.get("bins"), int):
            found[row["window"]] = row["bins"]
    known: list[int] = []
    while len(known) in found:
        known.append(found[len(known)])
    return known


def add_window_bins(run_dir: StoragePath, fingerprint: str, window: int, bins: int) -> None:
    """Write down the bins of a window, so that no later start has to plan it to find a bin."""
    append_json(_bins_path(run_dir, fingerprint), [{"window": window, "bins": bins}])
