"""Index corpora of any size: many parts are made in Ray Data tasks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from filelock import Timeout

from omni.cluster.ray_tasks import RayTasksError, run_tasks
from omni.corpus.build import add_part, alone, index_sources, make_part, progress
from omni.corpus.built_index import Task
from omni.corpus.other_files import utf8_name
from omni.corpus.sources import Options, source_of_part
from omni.errors import ConfigError, ManifestError
from omni.model.download import HubError
from omni.storage.filesystem import StorageError
from omni.storage.path import StoragePath
from omni.storage.uri import redact, report_storage_errors

_SAY_SECONDS = 5.0


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
            with alone(out):
                return index_sources(specs, out, options, say, _make_parts)
        except Timeout:
            raise ConfigError(f"--out {out}: another job is writing it") from None
        except ManifestError as error:
            raise ConfigError(f"--source: {redact(str(error))}") from None
        except HubError as error:
            raise RuntimeError(f"--source: {redact(str(error))}") from error
        except StorageError as error:
            raise ConfigError(f"--out: {error}") from None


def _make_parts(
    tasks: list[Task],
    todo: list[int],
    options: Options,
    out: StoragePath,
    say: Callable[[str], None],
) -> None:
    """Make the parts `todo` in one task each, and report progress. Starts Ray for several."""
    began = shown = time.monotonic()
    total: Counter[str] = Counter()
    own = [own_task(tasks[number]) for number in todo]
    try:
        for made in run_tasks(partial(make_part, options=options, out=out), own):
            add_part(total, made)
            now = time.monotonic()
            if now - shown > _SAY_SECONDS or total["parts"] == len(todo):
                shown = now
                say(progress(total, len(todo), now - began))
    except RayTasksError as error:
        raise RuntimeError(f"indexing stopped: {error}") from error


def own_task(task: Task) -> Task:
    """Keep what a part needs of its source: one of many files would bring the list of all."""
    source, part = task
    return source_of_part(source, part), part
