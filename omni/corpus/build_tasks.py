"""Index corpora of any size: many parts are made in Ray Data tasks."""

from __future__ import annotations

import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from filelock import Timeout

from omni.config import Config
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
    """Make the parts `todo` in one task each, and report progress. Starts Ray."""
    import ray

    from omni.cluster.ray_errors import ray_reason
    from omni.cluster.ray_init import start_ray

    start_ray(Config())
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `say` reports progress instead.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def make(batch: pa.Table) -> dict[str, Any]:
        [task] = batch["task"].to_pylist()
        return make_part(pickle.loads(task), options, out)

    items = [{"task": pickled(tasks[number])} for number in todo]
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        make, batch_size=1, batch_format="pyarrow"
    )
    began = shown = time.monotonic()
    total: Counter[str] = Counter()
    try:
        for row in made.iter_rows():
            add_part(total, row)
            now = time.monotonic()
            if now - shown > _SAY_SECONDS or total["parts"] == len(todo):
                shown = now
                say(progress(total, len(todo), now - began))
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"indexing stopped: {ray_reason(error)}") from error


def pickled(task: Task) -> bytes:
    """Pickle what one task needs: a list of all parts would be read again for each of them."""
    from ray import cloudpickle

    source, part = task
    data: bytes = cloudpickle.dumps((source_of_part(source, part), part))
    return data
