"""Save the input of a plan in the run's directory, to make the plan again without the corpus.

plan/FINGERPRINT.parquet has a row for each row of the training index: its id and positions (0: not
in the plan); of a mixture also the weight; with changes of speed also the name, and the positions
at each speed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni.augment.speed import Speeds
from omni.config import Config
from omni.metrics.run_files import write_bytes
from omni.plan.plan import Plan, Split, make_plan
from omni.storage.path import StoragePath

_KEY = b"omni.plan"


@dataclass(frozen=True)
class PlanFile:
    """Input of `make_plan`, and the ids of the utterances."""

    ids: list[str]
    lengths: np.ndarray
    """(n,) positions of each utterance; 0: not in the plan."""
    index_fingerprint: str
    seed: int
    bin_positions: int
    bins_per_step: int
    speeds: Speeds | None = None
    weights: np.ndarray | None = None
    """(n,) occurrences of each utterance in an epoch; None: one each."""

    def plan(self, steps: int) -> Plan:
        """Make the first `steps` steps of the plan."""
        return make_plan(
            self.lengths,
            index_fingerprint=self.index_fingerprint,
            seed=self.seed,
            bin_positions=self.bin_positions,
            bins_per_step=self.bins_per_step,
            max_steps=steps,
            speeds=self.speeds,
            weights=self.weights,
        )


def plan_path(run_dir: StoragePath, fingerprint: str) -> StoragePath:
    return run_dir / "plan" / f"{fingerprint}.parquet"


def write_plan_file(
    config: Config,
    split: Split,
    index_fingerprint: str,
    lengths: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """Write the input of the training split's plan, unless the file exists.

    lengths, weights: as in `PlanFile`.
    """
    path = plan_path(config.run_dir, split.plan.fingerprint)
    if path.is_file():
        return
    facts: dict[str, Any] = {
        "index_fingerprint": index_fingerprint,
        "seed": config.run.seed,
        "bin_positions": config.optim.bin_positions,
        "bins_per_step": config.optim.bins_per_step,
    }
    table = pa.table({"id": split.table["id"], "positions": pa.array(lengths, pa.int32())})
    if weights is not None:
        table = table.append_column("weight", pa.array(weights, pa.float64()))
    speeds = None if split.augmentation is None else split.augmentation.speeds
    if speeds is not None:
        facts["speeds"] = speeds.speeds
        table = table.append_column("name", pa.array(speeds.names))
        for number, positions in enumerate(speeds.positions):
            table = table.append_column(f"positions {number}", pa.array(positions))
    path.parent.mkdir(exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(facts)}), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_plan_file(path: StoragePath) -> PlanFile:
    """Read the input of a plan.

    Raises OSError for a missing file, ValueError or KeyError for one that is not a plan file.
    """
    with path.open("rb") as file:
        table = pq.read_table(file)
    facts = json.loads((table.schema.metadata or {})[_KEY])
    weights = table["weight"].to_numpy() if "weight" in table.column_names else None
    lengths = table["positions"].to_numpy().astype(np.int64)
    factors = facts.pop("speeds", None)
    speeds = None
    if factors is not None:
        positions = np.stack([table[f"positions {n}"].to_numpy() for n in range(len(factors))])
        names = table["name"].to_numpy()
        speeds = Speeds(tuple(factors), positions, lengths, names, facts["seed"])
    return PlanFile(table["id"].to_pylist(), lengths, speeds=speeds, weights=weights, **facts)
