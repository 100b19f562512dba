"""Make the parts of an index in Ray Data tasks."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.corpus.build import add_part, make_part, progress
from omni.corpus.built_index import Task
from omni.corpus.sources import Options
from omni.storage.path import StoragePath

_SAY_SECONDS = 5.0


def make_parts(
    tasks: list[Task],
    todo: list[int],
    options: Options,
    out: StoragePath,
    say: Callable[[str], None],
) -> None:
    """Make the parts `todo` in one task each, and report progress. Starts Ray."""
    start_ray(Config())
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `say` reports progress instead.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    held = {"tasks": ray.put(tasks)}  # Ray resolves a bare reference before every task.

    def make(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        [number] = batch["id"].tolist()
        return make_part(ray.get(held["tasks"])[todo[number]], options, out)

    made = ray.data.range(len(todo), override_num_blocks=len(todo)).map_batches(make, batch_size=1)
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
        raise RuntimeError(f"indexing stopped: {str(error).strip().splitlines()[-1]}") from error
