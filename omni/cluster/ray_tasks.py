"""Run independent pieces of work in Ray tasks."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from omni.config import Config
from omni.errors import ConfigError, ManifestError, first_line
from omni.storage.uri import reason_of

T = TypeVar("T")
R = TypeVar("R")


class RayTasksError(RuntimeError):
    """A task failed, or Ray did; in one line."""


def run_tasks(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield the result of `work` of each item, in the order in which they are done.

    A single item is worked on in this process; more start Ray, with a task and one CPU for each. A
    task gets its own item alone: a list of all would be read again by each of them. Raises
    RayTasksError for what fails.
    """
    if len(items) < 2:
        for item in items:
            yield _result(_attempt(work, item))
        return
    import ray
    from ray import cloudpickle

    from omni.cluster.ray_errors import ray_reason
    from omni.cluster.ray_init import start_ray

    start_ray(Config())
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # The caller reports progress instead.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def attempt(batch: pa.Table) -> dict[str, Any]:
        [item] = batch["item"].to_pylist()
        return {"result": [_attempt(work, pickle.loads(item))]}

    rows = [{"item": cloudpickle.dumps(item)} for item in items]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        attempt, batch_size=1, batch_format="pyarrow"
    )
    try:
        for row in done.iter_rows():
            yield _result(row["result"])
    except ray.exceptions.RayError as error:
        raise RayTasksError(ray_reason(error)) from error


def _attempt(work: Callable[[T], R], item: T) -> bytes:
    """Pickle the result of `work`, or the line that says why it failed."""
    try:
        return pickle.dumps((work(item), ""))
    except OSError as error:
        return pickle.dumps((None, reason_of(error)))
    except (ConfigError, ManifestError, RuntimeError) as error:
        return pickle.dumps((None, first_line(error)))
    except Exception as error:
        return pickle.dumps((None, f"{type(error).__name__}: {first_line(error)}"))


def _result(pickled: bytes) -> Any:
    result, reason = pickle.loads(pickled)
    if reason:
        raise RayTasksError(reason)
    return result
