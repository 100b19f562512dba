"""Files of a prepared corpus: rows with token ids and positions, one Parquet file for each part.

    NAME.parquet    rows of the index with the columns of `PlannedRow`, and
      positions     positions at speed 1; 0: not in the plan
      positions_K   positions at speed number K of `augment.speed`; 0: does not fit a bin
      name          hash of the content key, which draws the speed
      sentence      hash of the normalized text
      identity      hash of the id

A window is read from the parts that it takes rows of. Nothing here holds more than one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni.augment.speed import Speeds
from omni.corpus.index_row import DEFAULT_TASK
from omni.plan.windows import PartLengths, Parts, Window
from omni.storage.atomic import open_atomic
from omni.storage.digest import digest
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, as_path, open_ranges

FACTS = b"omni.part"
"""Key of the facts in the metadata of a file."""
_DRAWN = ("positions", "name", "sentence", "identity")
_READERS = 8
"""Parts that are read at a time, each in a thread."""


@dataclass(frozen=True)
class PartFacts:
    """Totals of a prepared part: all that is known of it without reading its rows."""

    path: str
    source: int
    """Number of its source."""
    rows: int
    usable: int
    """Rows that have positions."""
    positions: int
    """Positions of all rows at speed 1."""
    samples: int
    """Samples at 16 kHz of all rows."""
    lengths: str
    """Hash of the positions at all speeds."""
    content: str
    """Fingerprint of the rows, as of a whole index."""
    tokens: str
    """Fingerprint of the token ids."""
    longest_answer: int
    """Tokens of the longest answer of a usable row, its end token included."""
    silent: int
    """Rows that CTC learns nothing from, because they have no transcript."""
    beyond: int
    """Rows that have more tokens than soft tokens."""
    tasks: list[str]
    languages: dict[str, int]
    """Rows of each language; the empty name is that of rows without one."""
    rejects: list[dict[str, str]]


def write_part(path: StoragePath, table: pa.Table, facts: PartFacts) -> None:
    """Write a prepared part, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {FACTS: json.dumps(asdict(facts))}
    with open_atomic(path) as sink:
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")


def read_facts(path: StoragePath) -> PartFacts | None:
    """Read the totals of a prepared part; None if there is none, or it is damaged."""
    try:
        with open_ranges(path) as file:
            metadata = pq.read_metadata(file).metadata or {}
        return facts_of(json.loads(metadata[FACTS]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def facts_of(values: dict[str, Any]) -> PartFacts:
    """Make facts of their JSON. Raises TypeError for other fields."""
    return PartFacts(**values)


def lengths_digest(natural: np.ndarray, at_speed: np.ndarray | None, names: np.ndarray) -> str:
    """Hash the positions of a part's rows at all speeds, and the names that draw the speeds."""
    parts = [np.ascontiguousarray(natural, np.int32).tobytes()]
    if at_speed is not None:
        parts += [np.ascontiguousarray(at_speed, np.int32).tobytes(), names.tobytes()]
    return digest(*parts)


def parts_of(facts: Sequence[PartFacts], weights: tuple[float, ...]) -> Parts:
    """Collect what the plan needs of each part."""

    def column(name: str) -> np.ndarray:
        return np.asarray([getattr(part, name) for part in facts], np.int64)

    return Parts(
        rows=column("rows"),
        usable=column("usable"),
        sources=column("source"),
        positions=column("positions"),
        weights=weights,
        digests=tuple(part.lengths for part in facts),
    )


def all_there(paths: Sequence[str]) -> bool:
    """Tell whether no file of the parts has been removed, by listing their folders."""
    names: dict[StoragePath, set[str]] = {}
    for path in map(as_path, paths):
        if path.parent not in names:
            try:
                names[path.parent] = {found.name for found in path.parent.iterdir()}
            except OSError:
                return False
        if path.name not in names[path.parent]:
            return False
    return True


class PartFiles:
    """Lengths and rows of prepared parts.

    speeds: factors of `augment.speed`; None where no speed changes. tasks: names of the tasks of
    the run, which batches refer to by position; without them rows have no number of their task.
    """

    def __init__(
        self,
        paths: Sequence[str],
        starts: np.ndarray,
        *,
        seed: int,
        speeds: tuple[float, ...] | None = None,
        tasks: Sequence[str] = (),
    ) -> None:
        self._paths, self._starts, self._seed = list(paths), starts, seed
        self.speeds, self._tasks = speeds, list(tasks)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, part: int) -> str:
        return self._paths[part]

    def are_there(self) -> bool:
        """Tell whether no file has been removed."""
        return all_there(self._paths)

    def start(self, part: int) -> int:
        """Return the first utterance number of a part."""
        return int(self._starts[part])

    def lengths(self, part: int) -> PartLengths:
        """Read the positions of the rows of one part. Raises OSError, ValueError."""
        names = ["positions"]
        if self.speeds is not None:
            names += [*self._speed_columns(), "name"]
        return self._lengths_of(self._read(part, names))

    def rows(self, window: Window) -> tuple[pa.Table, PartLengths]:
        """Read the rows of a window in the order of its members, and their lengths."""
        parts = np.searchsorted(self._starts, window.members, side="right") - 1
        order = np.argsort(parts, kind="stable")
        numbers, first = np.unique(parts[order], return_index=True)
        wanted = np.split(order, first[1:])

        def rows_of(item: tuple[int, np.ndarray]) -> pa.Table:
            part, members = item
            inside = window.members[members] - self._starts[part]
            return self._read(part).take(pa.array(inside))

        items = list(zip(numbers.tolist(), wanted, strict=True))
        table = pa.concat_tables(list(parallel_map(rows_of, items, _READERS))).combine_chunks()
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        table = table.take(pa.array(back)).combine_chunks()
        return self._planned(table), self._lengths_of(table)

    def all_rows(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows of one part that are in the plan, or some of their columns."""
        names = None if columns is None else [*columns, "positions"]
        table = self._read(part, names)
        usable = np.flatnonzero(table["positions"].to_numpy() > 0)
        return self._planned(table.take(pa.array(usable)))

    def hashes(self, part: int, column: str) -> np.ndarray:
        """Read the hashes of one part: of column `sentence` or `identity`."""
        found: np.ndarray = self._read(part, [column])[column].to_numpy()
        return found

    def ids(self, numbers: Sequence[int]) -> list[str]:
        """Read the ids of some utterances."""
        named = {}
        for number in set(numbers):
            part = int(np.searchsorted(self._starts, number, side="right") - 1)
            column = self._read(part, ["id"])["id"]
            named[number] = str(column[number - int(self._starts[part])].as_py())
        return [named[number] for number in numbers]

    def _read(self, part: int, columns: list[str] | None = None) -> pa.Table:
        with open_ranges(as_path(self._paths[part])) as file:
            return pq.read_table(file, columns=columns, use_threads=False)

    def _speed_columns(self) -> list[str]:
        return [f"positions_{number}" for number in range(len(self.speeds or ()))]

    def _lengths_of(self, table: pa.Table) -> PartLengths:
        natural = table["positions"].to_numpy().astype(np.int64)
        if self.speeds is None:
            return PartLengths(natural)
        columns = [table[name].to_numpy() for name in self._speed_columns()]
        positions = np.stack(columns).astype(np.int32)
        names = table["name"].to_numpy()
        return PartLengths(natural, Speeds(self.speeds, positions, natural, names, self._seed))

    def _planned(self, table: pa.Table) -> pa.Table:
        """Leave out the columns of the plan, and number the tasks."""
        left_out = [n for n in table.column_names if n.startswith("positions_") or n in _DRAWN]
        table = table.drop_columns(left_out)
        if "task" in table.column_names and self._tasks:
            numbers = {name: number for number, name in enumerate(self._tasks)}
            given = [numbers[name or DEFAULT_TASK] for name in table["task"].to_pylist()]
            table = table.append_column("task_number", pa.array(given, pa.int32()))
        return table
