"""Ray Data pipeline: plan rows in, blocks of Whisper features out.

    bin numbers -> load (tasks: cache lookup, decode, log-mel) -> encode (actors: frozen Whisper)
    bin numbers -> read (tasks: cache lookup), where the cache holds all features

One row is one bin and one block is one microbatch of one rank. Order is kept from end to end, so
block k reaches rank k mod W, and the plan's integer says exactly what has been consumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.util.metrics import Histogram

from omni.cluster.capacity import selectors
from omni.cluster.ray_internals.data import SchedulerWorkarounds, row_numbers
from omni.cluster.stacks import stacks_after
from omni.cluster.timeouts import block_timeout
from omni.cluster.watchdog import limited
from omni.config import Config

# Ray's coordinators import this module. What only the stages need is imported where they run: torch
# alone takes seconds.
if TYPE_CHECKING:
    from omni.plan.plan import Split
    from omni.stream.feature_cache import FeatureCache
    from omni.stream.schema import LoadedRow
    from omni.stream.stream_settings import StreamSettings

_HISTOGRAM_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
# Ray's default: the load stage fuses with the read of the row numbers.
_LOADER_CPUS = 1.0


@dataclass(frozen=True)
class SharedSettings:
    """Settings of a stream, with those that only its stages read by reference."""

    config: Config
    bins_per_block: int
    encode: bool
    reference: ray.ObjectRef[StreamSettings]

    @classmethod
    def put(cls, settings: StreamSettings) -> SharedSettings:
        """Put settings into the object store, where they stay while this process lives."""
        return cls(settings.config, settings.bins_per_block, settings.encode, ray.put(settings))


def open_stream(
    references: list[ray.ObjectRef[Split]],
    settings: SharedSettings,
    workers: int,
    first_step: int,
    held_step: int,
) -> Dataset:
    """Open the stream: bins of the plan from `first_step` on, held-out ones after `held_step`."""
    from omni.plan.plan import stream_bins

    optim = settings.config.optim
    rows = stream_bins(
        ray.get(references), workers, optim.bins_per_block, first_step, held_step, optim.steps
    )
    return make_stream(references, rows, settings)


def make_stream(
    splits: Sequence[ray.ObjectRef[Split]],
    rows: Sequence[tuple[int, np.ndarray]],
    settings: SharedSettings,
) -> Dataset:
    """Build a dataset whose row k is the k-th bin of `rows`: pairs of (split number, its bins).

    Each array's length must be a multiple of bins_per_block, so that no block mixes splits.
    """
    set_context()
    config, per_block = settings.config, settings.bins_per_block
    numbers = np.concatenate([np.full(len(bins), split) for split, bins in rows])
    bins = np.concatenate([bins for _, bins in rows])
    if any(len(b) % per_block for _, b in rows):
        raise ValueError("rows of a split must fill whole blocks")
    order = ray.put((numbers.astype(np.int32), bins.astype(np.int64)))
    references: _References = {
        "order": order,
        "splits": list(splits),
        "settings": settings.reference,
    }
    timeout = _block_timeout(config)
    stage = _LoadStage if settings.encode else _ReadStage
    # Ray fuses the read with the load stage where both have the same number of tasks, and where the
    # load stage takes blocks as they are. A block of row numbers is a block of bins.
    _, for_encoder, for_loader = selectors(config)
    nodes: dict[str, Any] = {"label_selector": for_loader} if for_loader else {}
    blocks = row_numbers(len(bins), len(bins) // per_block, config.data.loaders, for_loader)
    loaded = blocks.map_batches(
        stage(references, timeout),
        batch_size=None,
        batch_format="numpy",
        compute=TaskPoolStrategy(size=config.data.loaders),
        num_cpus=_LOADER_CPUS,
        **nodes,
    )
    if not settings.encode:
        return loaded
    return loaded.map_batches(
        _EncodeActor,
        # In a list: Ray would resolve a reference that is an argument itself.
        fn_constructor_kwargs={"settings": [settings.reference], "timeout": timeout},
        batch_size=per_block,
        batch_format="pyarrow",
        # Ray Data restarts a dead actor without limit.
        compute=ActorPoolStrategy(size=config.encoder.actor_count, max_tasks_in_flight_per_actor=2),
        num_cpus=_cpus_unlike_loader(config.encoder.cpus),
        label_selector=for_encoder,
        num_gpus=config.encoder.gpus,
    )


def set_context() -> None:
    """Set up Ray Data in this process: one block stays one block, and nothing is printed."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data cuts blocks of 192 MiB or more into several, which would reach other ranks.
    context.target_max_block_size = None
    if SchedulerWorkarounds not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(SchedulerWorkarounds)


def _cpus_unlike_loader(cpus: float) -> float:
    """Change the encoder's CPUs a little where they equal the loader's.

    Ray fuses neighbouring stages with equal resources, and loading must not block an encoder.
    """
    return cpus + 1e-3 if cpus == _LOADER_CPUS else cpus


class _References(TypedDict):
    """Objects of the load stage. Ray resolves references in a container only on request."""

    order: ray.ObjectRef[tuple[np.ndarray, np.ndarray]]
    splits: list[ray.ObjectRef[Split]]
    settings: ray.ObjectRef[StreamSettings]


class _LoadStage:
    """Turn row numbers into bins with cached features, or log-mels where the cache has none."""

    def __init__(self, references: _References, timeout: float) -> None:
        self._references = references
        self._timeout = timeout

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        from omni.stream.schema import LOADED_SCHEMA

        with self._limited():
            return pa.Table.from_pylist(self._load(batch), LOADED_SCHEMA)

    def _limited(self) -> AbstractContextManager[None]:
        return _limited(self._timeout, self._settings.config, "loader")

    @property
    def _settings(self) -> StreamSettings:
        return _settings(self._references["settings"])

    def _load(self, batch: dict[str, np.ndarray]) -> list[LoadedRow]:
        import torch

        from omni.stream.stages import load_bin

        torch.set_num_threads(1)
        split_of, bin_of = ray.get(self._references["order"])
        cache = _shared_cache(self._settings)
        rows = []
        for number in batch["id"].tolist():
            split: Split = ray.get(self._references["splits"][split_of[number]])
            planned = int(bin_of[number])
            rows.append(load_bin(split.of_bin(planned), planned, self._settings, cache))
        return rows


class _ReadStage(_LoadStage):
    """Turn row numbers into encoded bins, all of whose features the cache held at the start.

    Features that have been damaged or removed since are encoded again, in a task that asks for the
    resources of an encoder.
    """

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        from omni.stream.encoded_block import encoded_block
        from omni.stream.schema import LOADED_SCHEMA

        with self._limited():
            rows = self._load(batch)
            if not any(mel is not None for row in rows for mels in row["mels"] for mel in mels):
                return encoded_block(rows, self._settings, {})
            encoder = self._settings.config.encoder
            encode: Any = ray.remote(_encode).options(
                num_cpus=encoder.cpus,
                num_gpus=encoder.gpus,
                label_selector=selectors(self._settings.config)[1],
                max_retries=2,
            )
            block: pa.Table = ray.get(
                encode.remote(pa.Table.from_pylist(rows, LOADED_SCHEMA), self._settings)
            )
            return block


def _encode(table: pa.Table, settings: StreamSettings) -> pa.Table:
    from omni.stream.stages import EncodeStage

    return EncodeStage(settings)(table)


class _EncodeActor:
    """Run the encode stage; end a hanging process, so that another actor takes the block."""

    def __init__(self, settings: list[ray.ObjectRef[StreamSettings]], timeout: float) -> None:
        from omni.stream.stages import EncodeStage

        shared = _settings(settings[0])
        self._encode, self._timeout, self._config = EncodeStage(shared), timeout, shared.config
        self._histogram = Histogram(
            "omni_encoder_batch_seconds",
            "Seconds that an encoder actor takes for one block.",
            _HISTOGRAM_SECONDS,
            ("run",),
        )
        self._histogram.set_default_tags({"run": shared.config.run.name})

    def __call__(self, table: pa.Table) -> pa.Table:
        with _limited(self._timeout, self._config, "encoder"):
            out = self._encode(table)
        seconds = sum(out["encode_seconds"].to_pylist())
        if seconds:
            self._histogram.observe(seconds)
        return out


@contextmanager
def _limited(timeout: float, config: Config, stage: str) -> Iterator[None]:
    """End this process if a block takes longer than `timeout`; say before where it stands."""
    with limited(timeout), stacks_after(timeout, config.run_dir, stage, "one block"):
        yield


def _block_timeout(config: Config) -> float:
    """Return the seconds allowed for one block.

    Less than a rank waits: otherwise the whole worker group would restart instead of one stage.
    """
    return block_timeout(config.train.timeout_seconds)


@functools.lru_cache(maxsize=4)
def _settings(reference: ray.ObjectRef[StreamSettings]) -> StreamSettings:
    """Read the settings of a stream once per process."""
    return ray.get(reference)


_CACHES: dict[str, FeatureCache] = {}


def _shared_cache(settings: StreamSettings) -> FeatureCache | None:
    """Open the cache once for all tasks of this worker process."""
    if settings.cache is None:
        return None
    if settings.cache not in _CACHES:
        cache = settings.open_cache()
        assert cache is not None
        _CACHES[settings.cache] = cache
    return _CACHES[settings.cache]
