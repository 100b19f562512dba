"""Measure the rows of an index in units of some rows, each of which leaves one file.

A file is named after the content of the recordings that it measures and the versions of what
measures them, so a unit that is there is not done again: the same command continues a killed one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError, decode_blocks, read_with_retry
from omni.audio.windows import FRAME, SAMPLING_RATE
from omni.corpus.index_row import IndexRow, span_of
from omni.errors import located
from omni.storage.atomic import open_atomic
from omni.storage.digest import digest
from omni.storage.path import StoragePath, open_ranges
from omni.texture.prosody import Prosody, measure_prosody

MEASURES_VERSION = 1
PACKAGES = ("silero-vad", "swift-f0")
UNIT_ROWS = 200
MEASURED = pa.schema(
    [
        ("fault", pa.large_string()),  # why nothing was measured; null: it was
        ("detail", pa.large_string()),
        ("seconds", pa.float64()),
        ("speech_seconds", pa.float64()),
        ("pauses", pa.int64()),
        ("pause_seconds", pa.float64()),
        ("level_db", pa.float64()),
        ("voiced_share", pa.float64()),
        ("pitch_hz", pa.float64()),
        ("pitch_semitones", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """Consecutive rows of a part of an index, and the file of their measures."""

    folder: StoragePath
    """Of the index: paths of recordings in it are relative to it."""
    part: StoragePath
    first: int
    rows: int
    file: str


def units_of(folder: StoragePath, part: StoragePath) -> list[Unit]:
    """Divide a part of an index."""
    with open_ranges(part) as source:
        keys = pq.read_table(source, columns=["key"])["key"].to_pylist()
    units = []
    for first in range(0, len(keys), UNIT_ROWS):
        of_unit = keys[first : first + UNIT_ROWS]
        name = digest(str(MEASURES_VERSION), *packages().values(), *of_unit)
        units.append(Unit(folder, part, first, len(of_unit), f"{name}.parquet"))
    return units


def packages() -> dict[str, str]:
    """Return the versions of the packages whose networks measure."""
    return {name: version(name) for name in PACKAGES}


def measure_unit(unit: Unit, out: StoragePath) -> dict[str, Any]:
    """Measure the rows of a unit and write its file; return counts of rows, samples and faults.

    Raises OSError when storage is unavailable.
    """
    import torch

    torch.set_num_threads(1)  # As many tasks as cores run beside each other.
    with open_ranges(unit.part) as source:
        table = pq.read_table(source).slice(unit.first, unit.rows)
    rows = [_measured(row, unit.folder) for row in table.to_pylist()]
    with open_atomic(out / unit.file) as sink:
        pq.write_table(pa.Table.from_pylist(rows, MEASURED), sink)
    return {
        "rows": len(rows),
        "samples": sum(table["samples"].to_pylist()),
        "faults": sum("fault" in row for row in rows),
    }


def is_relative(uri: str) -> bool:
    """Tell whether a path of an index is relative to its folder."""
    return not uri.startswith("/") and "://" not in uri


def _measured(row: IndexRow, folder: StoragePath) -> dict[str, Any]:
    """Measure one row; a recording that cannot be decoded is a fault."""
    try:
        return asdict(_prosody(row, folder))
    except AudioError as error:
        return {"fault": error.reason, "detail": error.detail}
    except OSError:
        raise
    except Exception as error:
        raise located(error, f"utterance {row['id']} ({row['uri']})") from error


def _prosody(row: IndexRow, folder: StoragePath) -> Prosody:
    """Raises AudioError."""
    if row["audios"]:
        raise AudioError("conversation", f"{row['id']}: several recordings, or none")
    uri = row["uri"]
    if is_relative(uri):
        uri = f"{folder}/{uri}"
    found = read_with_retry(
        uri, lambda where: measure_prosody(decode_blocks(where, span=span_of(row)))
    )
    samples = round(found.seconds * SAMPLING_RATE)
    if abs(samples - row["samples"]) > FRAME:
        raise AudioError(
            "length mismatch",
            f"{uri}: decoded {found.seconds:.3f} s, expected "
            f"{row['samples'] / SAMPLING_RATE:.3f} s as in the index",
        )
    return found
