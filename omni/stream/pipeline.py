"""The only Ray Data pipeline: plan rows in, blocks of Whisper features out.

    bin numbers -> load (tasks: cache lookup, decode, log-mel) -> encode (actors: frozen Whisper)

One row is one bin and one block is one microbatch of one rank. Order is kept from end to end, so
block k reaches rank k mod W, and the plan's integer says exactly what has been consumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.util.metrics import Histogram

from omni.cluster.ray_internals import SchedulerWorkarounds
from omni.cluster.watchdog import limited
from omni.metrics.table import PROMETHEUS
from omni.plan.plan import Split
from omni.stream.feature_cache import FeatureCache
from omni.stream.schema import LOADED_SCHEMA
from omni.stream.stages import EncodeStage, StreamSettings, load_bin

_BOUNDARIES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]  # seconds
_LOADER_CPUS = 1.0  # Ray's default: the load stage fuses with the read of the row numbers


def make_stream(
    splits: Sequence[ray.ObjectRef],
    rows: Sequence[tuple[int, np.ndarray]],
    settings: StreamSettings,
) -> Dataset:
    """A dataset whose row k is the k-th bin of `rows`: pairs of (number of the split, its bins).

    Each array's length must be a multiple of bins_per_block, so that no block mixes splits.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if SchedulerWorkarounds not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(SchedulerWorkarounds)
    config, per_block = settings.config, settings.bins_per_block
    numbers = np.concatenate([np.full(len(bins), split) for split, bins in rows])
    bins = np.concatenate([bins for _, bins in rows])
    if any(len(b) % per_block for _, b in rows):
        raise ValueError("rows of a split must fill whole blocks")
    order = ray.put((numbers.astype(np.int32), bins.astype(np.int64)))
    # refs travel inside a container, or Ray would resolve them before each task
    load = _LoadStage({"order": order, "splits": list(splits)}, settings)
    return (
        ray.data.range(len(bins), override_num_blocks=len(bins) // per_block)
        .map_batches(
            load,
            batch_size=per_block,
            batch_format="numpy",
            compute=TaskPoolStrategy(size=config.data.loaders),
            num_cpus=_LOADER_CPUS,
        )
        .map_batches(
            _EncodeActor,
            fn_constructor_kwargs={"settings": settings},
            batch_size=per_block,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=config.encoder.actor_count, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=_unlike_loader(config.encoder.cpus),
            label_selector=config.encoder.labels,
            num_gpus=config.encoder.gpus,  # a dead actor is restarted without limit, Ray's default
        )
    )


def _unlike_loader(cpus: float) -> float:
    """Ray fuses neighbouring stages that ask for the same; loading must not block an encoder."""
    return cpus + 1e-3 if cpus == _LOADER_CPUS else cpus


class _LoadStage:
    """Bins to rows with cached features, or log-mels where the cache has none."""

    def __init__(self, refs: dict[str, Any], settings: StreamSettings) -> None:
        self._refs = refs
        self._settings = settings

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        torch.set_num_threads(1)
        split_of, bin_of = ray.get(self._refs["order"])
        rows = []
        with limited(_patience(self._settings)):
            cache = _shared_cache(self._settings)
            for number in batch["id"].tolist():
                split: Split = ray.get(self._refs["splits"][split_of[number]])
                rows.append(load_bin(split, int(bin_of[number]), self._settings, cache))
        return pa.Table.from_pylist(rows, LOADED_SCHEMA)


class _EncodeActor(EncodeStage):
    """An encoder that ends when it hangs; Ray Data starts another, which gets the block again."""

    def __init__(self, settings: StreamSettings) -> None:
        super().__init__(settings)
        name = "omni_encoder_batch_seconds"
        self._seconds = Histogram(name, PROMETHEUS[name].help, _BOUNDARIES, ("run",))
        self._seconds.set_default_tags({"run": settings.config.run.name})

    def __call__(self, table: pa.Table) -> pa.Table:
        with limited(_patience(self._settings)):
            out = super().__call__(table)
        seconds = sum(out["encode_seconds"].to_pylist())
        if seconds:
            self._seconds.observe(seconds)
        return out


def _patience(settings: StreamSettings) -> float:
    """Seconds for one block: less than a rank waits, or the whole group would start again."""
    return settings.config.train.timeout_seconds / 2


_CACHES: dict[str, FeatureCache] = {}


def _shared_cache(settings: StreamSettings) -> FeatureCache | None:
    """This process's view of a cache: tasks of one worker process share it."""
    if settings.cache is None:
        return None
    if settings.cache not in _CACHES:
        cache = settings.open_cache()
        assert cache is not None
        _CACHES[settings.cache] = cache
    return _CACHES[settings.cache]
