"""Index corpora ahead of training: every part of every source, measured by Ray Data tasks.

A part that is there and was made of the same is not done again, so the same command continues an
interrupted one, and takes up what was added to a corpus.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from filelock import FileLock, Timeout

from omni.config import Config, ConfigError, without_secrets
from omni.data.index import INDEX_FILE, INDEX_VERSION, ManifestError, repeated_id
from omni.data.parts import about_part, fingerprint, part_name, write_part, write_whole
from omni.data.sources import Options, Part, Source, open_source
from omni.model.logmel import SAMPLING_RATE
from omni.train.trainer import start_ray

_SAY_SECONDS = 5.0
SECONDS = [0, 1, 2, 4, 8, 16, 30, 60, 600]  # lower edges of the histogram of lengths
CHARACTERS = [0, 10, 20, 40, 80, 160, 320, 640]  # and of the texts'

Task = tuple[Source, Part]


def make_index(
    specs: Sequence[str], out: Path, options: Options, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Index the sources in `out`, and count; `say` gets a line of progress now and then.

    Returns utterances, seconds, rejects by reason, languages, speakers, lengths and texts
    (utterances from each edge of SECONDS and CHARACTERS), parts and `done` of them in this call.
    Raises ConfigError when a source is not what it should be.
    """
    out = out.expanduser().absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            return _index(specs, out, options, say)
    except Timeout:
        raise ConfigError(f"--out {out}: another job is writing it") from None
    except ManifestError as error:
        raise ConfigError(f"--source: {without_secrets(str(error))}") from None
    except OSError as error:
        raise RuntimeError(f"{error.filename or out}: {error.strerror or error}") from error


def _index(
    specs: Sequence[str], out: Path, options: Options, say: Callable[[str], None]
) -> dict[str, Any]:
    tasks: list[Task] = []
    for spec in specs:
        source = open_source(spec, options)
        parts = source.parts()
        if not parts:
            raise ManifestError(f"{spec}: no utterances in it")
        say(f"{without_secrets(spec)}: {len(parts):,} parts")
        tasks += [(source, part) for part in parts]
    names = [part_name(*task) for task in tasks]
    if len(set(names)) < len(names):
        raise ManifestError("the same source is given twice")
    for stale in out.glob("*/*.tmp"):  # of a job that was killed: this one holds the lock
        stale.unlink(missing_ok=True)
    todo = [n for n, task in enumerate(tasks) if not _is_done(out, names[n], task, options)]
    if todo:
        (out / INDEX_FILE).unlink(missing_ok=True)  # training must not read a mixture of two
        start_ray(Config())
        _follow(tasks, todo, options, out, say)
    result = _finish(tasks, names, out)
    for stale in [*out.glob("parts/*.parquet"), *out.glob("audio/*.bin")]:
        if stale.stem not in set(names):  # of a corpus as it was before
            stale.unlink()
    return {**result, "parts": len(tasks), "done": len(todo)}


def _is_done(out: Path, name: str, task: Task, options: Options) -> bool:
    about = about_part(out, name)
    return about is not None and about["fingerprint"] == fingerprint(task[1], options)


def _follow(
    tasks: list[Task], todo: list[int], options: Options, out: Path, say: Callable[[str], None]
) -> None:
    """Have the parts made, one task each, and tell from time to time."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    held = {"tasks": ray.put(tasks)}  # in a container, or Ray would resolve it before each task

    def make(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        [number] = batch["id"].tolist()
        return _make_part(ray.get(held["tasks"])[todo[number]], options, out)

    made = ray.data.range(len(todo), override_num_blocks=len(todo)).map_batches(make, batch_size=1)
    began = shown = time.monotonic()
    total: Counter[str] = Counter()
    try:
        for row in made.iter_rows():
            if row["error"]:
                raise ManifestError(row["error"])
            total.update({name: row[name] for name in ("rows", "samples", "rejects", "bytes")})
            total["parts"] += 1
            now = time.monotonic()
            if now - shown > _SAY_SECONDS or total["parts"] == len(todo):
                shown = now
                say(_progress(total, len(todo), now - began))
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"indexing stopped: {str(error).strip().splitlines()[-1]}") from error


def _progress(total: Counter[str], parts: int, seconds: float) -> str:
    left = seconds / total["parts"] * (parts - total["parts"])
    return (
        f"{total['parts']:,}/{parts:,} parts, {total['rows']:,} utterances, "
        f"{total['samples'] / SAMPLING_RATE / 3600:,.2f} h, {total['rejects']:,} rejects, "
        f"{total['bytes'] / 1e9:,.2f} GB kept, {total['rows'] / seconds:,.0f}/s, {left:,.0f} s left"
    )


def _make_part(task: Task, options: Options, out: Path) -> dict[str, Any]:
    """A row of counts, or of what is wrong with the source."""
    counts: dict[str, Any] = {"rows": 0, "samples": 0, "bytes": 0, "rejects": 0, "error": ""}
    try:
        made = write_part(*task, options, out)
        counts |= {**made, "rejects": len(made["rejects"])}
    except ManifestError as error:
        counts["error"] = str(error)
    return {name: [value] for name, value in counts.items()}


def _finish(tasks: list[Task], names: list[str], out: Path) -> dict[str, Any]:
    """Look over all parts, one in memory at a time but for the ids, and write what belongs to all.

    Raises ManifestError for an id that occurs twice.
    """
    ids: list[pa.ChunkedArray] = []
    languages: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    speakers: set[str] = set()
    lengths, texts = np.zeros(len(SECONDS), np.int64), np.zeros(len(CHARACTERS), np.int64)
    samples = 0
    rejects: list[str] = []
    columns = ["id", "samples", "text", "language", "speaker"]
    for name in names:
        table = pq.read_table(out / "parts" / f"{name}.parquet", columns=columns)
        ids.append(table["id"])
        for entry in pc.value_counts(table["language"]).to_pylist():
            languages[entry["values"] or "unknown"] += entry["counts"]
        speakers.update(pc.unique(table["speaker"].drop_null()).to_pylist())
        samples += int(pc.sum(table["samples"]).as_py() or 0)
        lengths += _histogram(pc.divide(table["samples"], SAMPLING_RATE), SECONDS)
        texts += _histogram(pc.utf8_length(table["text"]), CHARACTERS)
        about = about_part(out, name)
        for reject in about["rejects"] if about else []:
            reasons[reject["reason"]] += 1
            rejects.append(json.dumps(reject, ensure_ascii=False) + "\n")
    every = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
    if (repeated := repeated_id(every)) is not None:
        raise ManifestError(_twice(repeated, ids, tasks))
    if not len(every):
        first = f"; the first: {rejects[0].strip()}" if rejects else ""
        raise ManifestError(f"all {len(rejects)} rows were rejected{first}")
    result = {
        "utterances": len(every),
        "seconds": samples / SAMPLING_RATE,
        "rejects": dict(reasons.most_common()),
        "languages": dict(languages.most_common()),
        "speakers": len(speakers),
        "lengths": lengths.tolist(),
        "texts": texts.tolist(),
    }
    write_whole(out / "rejects.jsonl", "".join(rejects).encode(errors="replace"))
    sources = list(dict.fromkeys(without_secrets(source.spec) for source, _ in tasks))
    about = {"version": INDEX_VERSION, "sources": sources, **result, "parts": names}
    write_whole(out / INDEX_FILE, json.dumps(about, indent=1, ensure_ascii=False).encode())
    return result


def _histogram(values: pa.ChunkedArray, edges: list[int]) -> np.ndarray:
    """How many values lie from each edge up to the next."""
    counts, _ = np.histogram(values.to_numpy(), [*edges, np.inf])
    return counts


def _twice(repeated: str, ids: list[pa.ChunkedArray], tasks: list[Task]) -> str:
    places = []
    for column, (source, part) in zip(ids, tasks, strict=True):
        found = pc.sum(pc.equal(column, repeated)).as_py() or 0
        places += [f"{source.spec} (part {part.name})"] * found
    return (
        f"the id {repeated!r} occurs twice: in {places[0]} and in {places[1]}; "
        "ids must differ (--id_column names another column, --number_ids makes ids of places)"
    )


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The closing table of a finished index."""
    lines = [
        f"utterances  {result['utterances']:,}",
        f"hours       {result['seconds'] / 3600:,.2f}",
        f"languages   {_listed(result['languages'])}",
        f"speakers    {result['speakers'] or 'unknown'}",
        f"left out    {_listed(result['rejects']) if result['rejects'] else 'none'}",
    ]
    for title, edges, counts in (
        ("seconds", SECONDS, result["lengths"]),
        ("characters", CHARACTERS, result["texts"]),
    ):
        lines.append(f"{title}:")
        top = max(counts)
        for number, count in enumerate(counts):
            upto = f"to {edges[number + 1]}" if number + 1 < len(edges) else "and more"
            bar = "#" * -(-40 * count // top)
            lines.append(f"  {f'{edges[number]} {upto}':>14} {count:>12,} {bar}".rstrip())
    return lines


def _listed(counts: dict[str, int], most: int = 12) -> str:
    named = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    rest = [f"{len(counts) - most} more"] if len(counts) > most else []
    return ", ".join(named + rest)
