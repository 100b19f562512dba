"""Index corpora ahead of training: every part of every source, measured by Ray Data tasks.

A part that is there and was made of the same is not done again, so the same command continues an
interrupted one, and takes up what was added to a corpus.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from filelock import FileLock, Timeout

from omni.config import Config, ConfigError
from omni.data.built import Task, finish
from omni.data.index import INDEX_FILE, ManifestError
from omni.data.parts import about_part, fingerprint, part_name, write_part
from omni.data.sources import Options, open_source
from omni.model.hub import HubError
from omni.model.logmel import SAMPLING_RATE
from omni.place import without_secrets
from omni.train.trainer import start_ray

_SAY_SECONDS = 5.0


def make_index(
    specs: Sequence[str], out: Path, options: Options, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Index the sources in `out`, and count; `say` gets a line of progress now and then.

    Returns what `omni.data.built.finish` counts, `parts`, and `done`: those made in this call.
    Raises ConfigError when a source is not what it should be, and RuntimeError for what may pass.
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
    except HubError as error:
        raise RuntimeError(f"--source: {without_secrets(str(error))}") from error
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
    result = finish(tasks, out)
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
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `say` tells what it would
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
