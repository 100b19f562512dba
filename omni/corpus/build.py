"""Build an index folder: measure every part of every source in Ray Data tasks.

A part that is there and was made of the same is not done again, so the same command continues an
interrupted one, and takes up what was added to a corpus.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from filelock import FileLock, Timeout

from omni.audio.logmel import SAMPLING_RATE
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.corpus.build_part import about_part, fingerprint, part_name, write_part
from omni.corpus.built_index import Task, finish
from omni.corpus.manifest import INDEX_FILE
from omni.corpus.other_files import utf8_name
from omni.corpus.sources import Options, open_source
from omni.errors import ConfigError, ManifestError
from omni.model.download import HubError
from omni.storage.filesystem import StorageError
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath
from omni.storage.retry import retry_storage
from omni.storage.uri import public_uri, reason_of, redact, report_storage_errors

_SAY_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0  # Retry unavailable storage for this long.


def make_index(
    specs: Sequence[str], out: StoragePath, options: Options, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Index the sources into the folder `out`; call `say` with a line of progress now and then.

    Returns the counts of `omni.corpus.built_index.finish`, `parts`, and `done`: those made in this
    call.
    Raises ConfigError when a source is not what it should be, and RuntimeError for what may pass.
    """
    out = out.expanduser().absolute()
    if (shown := utf8_name(str(out))) != str(out):
        raise ConfigError(f"--out {shown}: expected a path in UTF-8")
    with report_storage_errors(f"--out {out}"):
        try:
            out.mkdir(parents=True, exist_ok=True)
            with _alone(out):
                return _index(specs, out, options, say)
        except Timeout:
            raise ConfigError(f"--out {out}: another job is writing it") from None
        except ManifestError as error:
            raise ConfigError(f"--source: {redact(str(error))}") from None
        except HubError as error:
            raise RuntimeError(f"--source: {redact(str(error))}") from error
        except StorageError as error:
            raise ConfigError(f"--out: {error}") from None


def _alone(out: StoragePath) -> contextlib.AbstractContextManager[Any]:
    """Lock the folder against a second job; object storage has no locks."""
    return FileLock(out / ".lock", timeout=0) if isinstance(out, Path) else contextlib.nullcontext()


def _index(
    specs: Sequence[str], out: StoragePath, options: Options, say: Callable[[str], None]
) -> dict[str, Any]:
    tasks: list[Task] = []
    for spec in specs:
        with report_storage_errors(f"--source {public_uri(spec)}"):
            try:
                source = open_source(spec, options)
                parts = source.parts()
            except StorageError as error:
                raise ManifestError(str(error)) from None
        if not parts:
            raise ManifestError(f"{public_uri(spec)}: no utterances in it")
        say(f"{public_uri(spec)}: {len(parts):,} parts")
        tasks += [(source, part) for part in parts]
    names = [part_name(*task) for task in tasks]
    if len(set(names)) < len(names):
        raise ManifestError("the same source is given twice")
    if isinstance(out, Path):
        for stale in out.glob("*/*.tmp"):  # left by a killed job, since this one holds the lock
            stale.unlink(missing_ok=True)

    def is_done(number: int) -> bool:
        about = about_part(out, names[number])
        return about is not None and about["fingerprint"] == fingerprint(tasks[number][1], options)

    todo = [n for n, done in enumerate(parallel_map(is_done, range(len(tasks)))) if not done]
    if todo:
        (out / INDEX_FILE).unlink(
            missing_ok=True
        )  # Training must not read a mix of old and new parts.
        start_ray(Config())
        _follow(tasks, todo, options, out, say)
    result = finish(tasks, out)
    known = set(names)
    for old in [*(out / "parts").glob("*.parquet"), *(out / "audio").glob("*.bin")]:
        if old.stem not in known:  # made from an earlier state of the corpus
            old.unlink()
    return {**result, "parts": len(tasks), "done": len(todo)}


def _follow(
    tasks: list[Task],
    todo: list[int],
    options: Options,
    out: StoragePath,
    say: Callable[[str], None],
) -> None:
    """Make the parts, one task each, and report progress."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `say` reports progress instead.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    held = {"tasks": ray.put(tasks)}  # Ray resolves a bare reference before every task.

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
            if row["unavailable"]:  # Finished parts stay: the same command continues.
                raise RuntimeError(f"indexing stopped: {row['unavailable']}")
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


def _make_part(task: Task, options: Options, out: StoragePath) -> dict[str, Any]:
    """Write one part; return its counts and errors as columns of one row."""
    counts: dict[str, Any] = dict.fromkeys(("rows", "samples", "bytes", "rejects"), 0)
    counts |= {"error": "", "unavailable": ""}  # of the source; of its storage, which may recover
    try:
        made = retry_storage(lambda: write_part(*task, options, out), seconds=_PATIENCE_SECONDS)
        counts |= {**made, "rejects": len(made["rejects"])}
    except ManifestError as error:
        counts["error"] = str(error)
    except OSError as error:
        counts["unavailable"] = reason_of(error)
    return {name: [value] for name, value in counts.items()}
