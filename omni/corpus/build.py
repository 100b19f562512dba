"""Build an index folder: measure every part of every source.

A few parts are made here; `omni.corpus.build_tasks` makes many.

A part that is there and was made of the same is not done again, so the same command continues an
interrupted one, and takes up what was added to a corpus.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock

from omni.audio.windows import SAMPLING_RATE
from omni.corpus.build_part import about_part, fingerprint, part_name, write_part
from omni.corpus.built_index import Task, finish
from omni.corpus.manifest import INDEX_FILE
from omni.corpus.sources import Options, open_source
from omni.errors import LocatedError, ManifestError, counted, located
from omni.storage.filesystem import StorageError
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import StoragePath
from omni.storage.retry import retry_storage
from omni.storage.uri import public_uri, reason_of, report_storage_errors

FEW_PARTS = 4
"""So many parts are made in this process: starting Ray takes longer."""
MakeParts: TypeAlias = Callable[
    [list[Task], list[int], Options, StoragePath, Callable[[str], None]], None
]
_SAY_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0  # Retry unavailable storage for this long.


def index_few(spec: str, out: StoragePath, options: Options) -> None:
    """Index a small source into the folder `out` without Ray, or bring that up to date.

    Raises ManifestError for a wrong source, and for one of more than FEW_PARTS parts.
    """
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, _PATIENCE_SECONDS):
        index_sources([spec], out, options, lambda line: None)


def index_here(spec: str, out: StoragePath, options: Options, say: Callable[[str], None]) -> None:
    """Index a source of any size as `index_few` does. Raises ManifestError for a wrong source."""
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, _PATIENCE_SECONDS):
        index_sources([spec], out, options, say, _make_here)


def alone(out: StoragePath, seconds: float = 0.0) -> contextlib.AbstractContextManager[Any]:
    """Lock the folder against a second job, waiting for it; object storage has no locks."""
    if isinstance(out, Path):
        return FileLock(out / ".lock", timeout=seconds)
    return contextlib.nullcontext()


def index_sources(
    specs: Sequence[str],
    out: StoragePath,
    options: Options,
    say: Callable[[str], None],
    make_many: MakeParts | None = None,
) -> dict[str, Any]:
    """Index the sources into a locked folder.

    make_many: makes more than FEW_PARTS parts; None refuses them. Raises ManifestError.
    """
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
        say(f"{public_uri(spec)}: {counted(len(parts), 'part')}")
        tasks += [(source, part) for part in parts]
    if make_many is None and len(tasks) > FEW_PARTS:
        raise ManifestError(
            f"{public_uri(specs[0])}: too large to be indexed at each start, {len(tasks):,} parts; "
            f"`omni index --source {public_uri(specs[0])} --out DIR` makes an index to train on"
        )
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
        # Training must not read a mix of old and new parts.
        (out / INDEX_FILE).unlink(missing_ok=True)
        few = len(todo) <= FEW_PARTS and options.segment is None
        make = _make_here if few or make_many is None else make_many
        make(tasks, todo, options, out, say)
    result = finish(tasks, out, options.keep)
    known = set(names)
    for old in [*(out / "parts").glob("*.parquet"), *(out / "audio").glob("*.bin")]:
        if old.stem not in known:  # made from an earlier state of the corpus
            old.unlink()
    return {**result, "parts": len(tasks), "done": len(todo)}


def _make_here(
    tasks: list[Task],
    todo: list[int],
    options: Options,
    out: StoragePath,
    say: Callable[[str], None],
) -> None:
    """Make the parts one after another in this process."""
    began = shown = time.monotonic()
    total: Counter[str] = Counter()
    for number in todo:
        add_part(total, make_part(tasks[number], options, out))
        now = time.monotonic()
        if now - shown > _SAY_SECONDS or total["parts"] == len(todo):
            shown = now
            say(progress(total, len(todo), max(now - began, 1e-3)))


def add_part(total: Counter[str], made: dict[str, Any]) -> None:
    """Add the counts of a part. Raises ManifestError, or RuntimeError for storage that failed."""
    if made["error"]:
        raise ManifestError(made["error"])
    if made["failed"]:
        raise RuntimeError(f"indexing stopped: {made['failed']}")
    if made["unavailable"]:  # Finished parts stay: the same command continues.
        raise RuntimeError(f"indexing stopped: {made['unavailable']}")
    total.update({name: made[name] for name in ("rows", "samples", "rejects", "bytes")})
    total["parts"] += 1


def progress(total: Counter[str], parts: int, seconds: float) -> str:
    left = seconds / total["parts"] * (parts - total["parts"])
    return (
        f"{total['parts']:,}/{counted(parts, 'part')}, {counted(total['rows'], 'utterance')}, "
        f"{total['samples'] / SAMPLING_RATE / 3600:,.2f} h, {total['rejects']:,} rejects, "
        f"{total['bytes'] / 1e9:,.2f} GB kept, {total['rows'] / seconds:,.0f}/s, {left:,.0f} s left"
    )


def make_part(task: Task, options: Options, out: StoragePath) -> dict[str, Any]:
    """Write one part; return its counts and errors."""
    counts: dict[str, Any] = dict.fromkeys(("rows", "samples", "bytes", "rejects"), 0)
    # Of the source; of its storage, which may recover; and what nobody expected.
    counts |= {"error": "", "unavailable": "", "failed": ""}
    try:
        made = retry_storage(lambda: write_part(*task, options, out), seconds=_PATIENCE_SECONDS)
        counts |= {**made, "rejects": len(made["rejects"])}
    except ManifestError as error:
        counts["error"] = str(error)
    except OSError as error:
        counts["unavailable"] = reason_of(error)
    except Exception as error:
        source, part = task
        at = f"{public_uri(source.spec)}, part {part.name}"
        named = isinstance(error, LocatedError)
        counts["failed"] = f"{at}: {error}" if named else str(located(error, at))
    return counts
