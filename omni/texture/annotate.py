"""Annotate a corpus: an index of it whose rows carry measured prosody as labels.

DIR/index.json, parts/, rejects.jsonl   an index folder (omni.corpus.build_part)
DIR/annotations.json                    bounds of the classes, and what was left out
DIR/measured/                           measures of units of rows, which are not made again
DIR/source/                             index of a corpus of another shape than an index folder
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import Timeout

from omni.audio.windows import SAMPLES_PER_HOUR, SAMPLING_RATE
from omni.cluster.ray_tasks import run_tasks
from omni.corpus.build import alone
from omni.corpus.build_tasks import make_index
from omni.corpus.index import INDEX_VERSION, SCHEMA
from omni.corpus.manifest import INDEX_FILE, absolute
from omni.corpus.sources import Options
from omni.errors import ConfigError, ManifestError, counted
from omni.storage.atomic import open_atomic, write_atomic
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath, open_ranges, raise_if_unreachable
from omni.storage.uri import report_storage_errors
from omni.texture.labels import (
    MEASURES,
    Bounds,
    Labels,
    Measure,
    Within,
    label_rows,
    names_of,
    text_columns,
)
from omni.texture.measured import MEASURED, Unit, is_relative, measure_unit, packages, units_of

ANNOTATIONS_FILE = "annotations.json"
_SAY_SECONDS = 5.0


@dataclass(frozen=True)
class Annotating:
    """Name the measures, and the group whose terciles become classes.

    least: utterances that a speaker or language needs for classes of its own.
    like: an annotated index whose bounds are used instead, so that a class means the same in both.
    """

    measures: tuple[Measure, ...] = MEASURES
    within: Within = "corpus"
    least: int = 30
    like: StoragePath | None = None


def annotate(
    specs: Sequence[str],
    out: StoragePath,
    how: Annotating,
    options: Options,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write an annotated index of the corpora into the folder `out`, or continue to.

    specs: one index folder, or corpora of other shapes. Returns what annotations.json holds, and
    `done` of `units` that were measured in this call.
    Raises ConfigError when the corpora are not what they should be, RuntimeError for what may pass.
    """
    out = out.expanduser().absolute()
    with report_storage_errors(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        try:
            with alone(out):
                return _annotate(specs, out, how, options, say)
        except Timeout:
            raise ConfigError(f"--out {out}: another job is writing it") from None
        except ManifestError as error:
            raise ConfigError(str(error)) from None


def _annotate(
    specs: Sequence[str],
    out: StoragePath,
    how: Annotating,
    options: Options,
    say: Callable[[str], None],
) -> dict[str, Any]:
    folder = _index_folder(specs, out)
    if folder is None:
        folder = out / "source"
        make_index(specs, folder, options, say)
    about = _read_about(folder)
    _check_names(about, how)
    bounds = None if how.like is None else _bounds_of(how.like, how)
    names = [f"{name}.parquet" for name in about["parts"]]
    parts = [folder / "parts" / name for name in names]
    units = list(parallel_map(partial(units_of, folder), parts))
    flat = [unit for of_part in units for unit in of_part]
    done = _measure(flat, out / "measured", say)
    rows = [_rows(out / "measured", *pair) for pair in zip(parts, units, strict=True)]
    labels = label_rows(pa.concat_tables(rows), how.measures, how.within, how.least, bounds)
    (out / INDEX_FILE).unlink(missing_ok=True)  # Training must not read a mix of old and new parts.
    (out / "parts").mkdir(parents=True, exist_ok=True)
    first = 0
    for name, part, of_part in zip(names, parts, rows, strict=True):
        _write_part(part, out / "parts" / name, labels, first, folder)
        first += len(of_part)
    _remove_others(out / "parts", set(names))
    _remove_others(out / "measured", {unit.file for unit in flat})
    annotations = {
        "version": 1,
        "packages": packages(),
        "within": how.within,
        "utterances": first,
        "measures": labels.summary,
        "notes": _notes(about, how),
    }
    write_atomic(out / ANNOTATIONS_FILE, _json(annotations))
    write_atomic(out / "rejects.jsonl", (folder / "rejects.jsonl").read_bytes())
    counts = {**about.get("labels", {}), **labels.counts}
    write_atomic(out / INDEX_FILE, _json({**about, "labels": counts}))
    return {**annotations, "units": len(flat), "done": done}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _index_folder(specs: Sequence[str], out: StoragePath) -> StoragePath | None:
    """Return the index folder among `specs`; None: they are corpora of other shapes.

    Raises ConfigError.
    """
    folders = [spec for spec in specs if _is_index_folder(spec)]
    if not folders:
        return None
    if len(specs) > 1:
        raise ConfigError(
            f"{folders[0]}: expected one index folder alone, or corpora of other shapes, "
            f"got {len(specs)} corpora"
        )
    if (folder := absolute(folders[0])) == out:
        raise ConfigError(f"--out {out}: expected another folder than that of the index")
    return folder


def _is_index_folder(spec: str) -> bool:
    """Tell a path from the specs of other kinds, such as hf:NAME, which are no paths."""
    is_path = "://" in spec or ":" not in spec
    return is_path and (absolute(spec) / INDEX_FILE).is_file()


def _notes(about: dict[str, Any], how: Annotating) -> list[str]:
    languages = len(about.get("languages", {}))
    if "rate" in how.measures and how.within == "corpus" and languages > 1:
        return [
            f"rate_class compares characters of {languages} languages: --within language divides "
            "each by itself"
        ]
    return []


def _read_about(folder: StoragePath) -> dict[str, Any]:
    """Read the index.json of a folder. Raises ManifestError."""
    try:
        about: dict[str, Any] = json.loads((folder / INDEX_FILE).read_bytes())
        if about["version"] != INDEX_VERSION:
            raise ValueError(f"version {about['version']!r}, expected {INDEX_VERSION}")
        about["parts"] = [Path(name).name for name in about["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{folder}: the index is damaged: {error}") from None
    return about


def _check_names(about: dict[str, Any], how: Annotating) -> None:
    """Raise ConfigError for a label that the index has already: it may mean something else."""
    if twice := [name for name in names_of(how.measures) if name in about.get("labels", {})]:
        raise ConfigError(f"--with: the index has the label {twice[0]!r} already")


def _bounds_of(like: StoragePath, how: Annotating) -> dict[str, Bounds]:
    """Read the bounds of another annotated index. Raises ConfigError."""
    path = like / ANNOTATIONS_FILE
    try:
        other = json.loads(path.read_bytes())
        within, bounds = other["within"], {m: f["bounds"] for m, f in other["measures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_if_unreachable(path, error)
        raise ConfigError(f"--like {like}: expected an annotated index: {error}") from None
    if within != how.within:
        raise ConfigError(f"--like {like}: its classes are within the {within}, not {how.within}")
    if lacking := [measure for measure in how.measures if measure not in bounds]:
        raise ConfigError(f"--like {like}: {lacking[0]} was not measured there")
    return bounds


def _measure(units: Sequence[Unit], folder: StoragePath, say: Callable[[str], None]) -> int:
    """Measure the units that are missing; return their number. Raises RuntimeError."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    todo = list({unit.file: unit for unit in units if unit.file not in there}.values())
    rows, total = (sum(unit.rows for unit in some) for some in (todo, units))
    say(f"{counted(total, 'utterance')}, {total - rows:,} measured already")
    began = shown = time.monotonic()
    done = samples = faults = 0
    try:
        for made in run_tasks(partial(measure_unit, out=folder), todo):
            done, samples = done + made["rows"], samples + made["samples"]
            faults += made["faults"]
            now = time.monotonic()
            if now - shown > _SAY_SECONDS or done == rows:
                shown, speed = now, samples / SAMPLING_RATE / max(now - began, 1e-3)
                say(
                    f"{done:,}/{counted(rows, 'utterance')}, "
                    f"{samples / SAMPLES_PER_HOUR:,.2f} h at {speed:,.0f} audio-s/s, "
                    f"{faults:,} not measured"
                )
    except RuntimeError as error:
        raise RuntimeError(f"annotating stopped: {error}") from error
    return len(todo)


def _rows(measured: StoragePath, part: StoragePath, units: Sequence[Unit]) -> pa.Table:
    """Read the measures of a part and what labels need of its rows. Raises ManifestError."""
    columns = ["text", "task", "messages", "speaker", "language"]
    with open_ranges(part) as source:
        texts = text_columns(pq.read_table(source, columns=columns))
    tables = [MEASURED.empty_table()]
    for unit in units:
        with open_ranges(measured / unit.file) as source:
            tables.append(pq.read_table(source))
    table = pa.concat_tables(tables)
    if len(table) != len(texts):
        raise ManifestError(f"{part}: {len(texts)} rows, {len(table)} measured: delete {measured}")
    for name in texts.column_names:
        table = table.append_column(name, texts[name].combine_chunks())
    return table


def _write_part(
    part: StoragePath, target: StoragePath, labels: Labels, first: int, folder: StoragePath
) -> None:
    """Copy a part of the index, with labels; paths of recordings in its folder become absolute."""
    with open_ranges(part) as source:
        table = pq.read_table(source)
    rows = table.to_pylist()
    for number, row in enumerate(rows, start=first):
        known = json.loads(row.get("labels") or "{}")
        merged = {**known, **labels.of_row(number)}
        row["labels"] = json.dumps(merged, ensure_ascii=False) if merged else None
        for recording in (row, *(row["audios"] or [])):
            if is_relative(recording["uri"]):
                recording["uri"] = f"{folder}/{recording['uri']}"
    with open_atomic(target) as sink:
        written = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(written.replace_schema_metadata(table.schema.metadata), sink)


def _remove_others(folder: StoragePath, names: set[str]) -> None:
    """Remove the files of earlier states of the corpus."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def summary_lines(annotations: dict[str, Any]) -> list[str]:
    """Return the closing table of an annotated index."""
    lines = []
    for measure, found in annotations["measures"].items():
        quantiles = "  ".join(f"{value:,.1f}" for value in found["quantiles"].values())
        lines.append(
            f"{measure:<8}{found['utterances']:>9,} of {annotations['utterances']:,}; "
            f"5, 25, 50, 75, 95 %: {quantiles or 'none'}"
        )
        for title, counts in (
            ("classes", found["classes"]),
            ("without a value", found["missing"]),
            ("with a value, without a class", found["without_class"]),
        ):
            if counts:
                listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                lines.append(f"{'':8}{title}: {listed}")
    return lines + [f"note: {note}" for note in annotations["notes"]]
