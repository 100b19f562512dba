"""Ray Data pipeline: numbers of blocks in, blocks of Whisper features out.

    block numbers -> load (tasks: cache lookup, decode, log-mel) -> encode (actors: frozen Whisper)
    block numbers -> read (tasks: cache lookup), where the cache holds all features

One row is one bin, and one block is what one rank trains in one or several steps. Order is kept
from end to end, so that the ranks of a stream take turns with its blocks, and the plan's integer
says exactly what has been consumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.util.metrics import Histogram

from omni.cluster.capacity import selectors
from omni.cluster.ray_internals.data import block_numbers, set_scheduling
from omni.cluster.stacks import stacks_after
from omni.cluster.timeouts import block_timeout
from omni.cluster.watchdog import limited
from omni.config import Config

# Ray's coordinators import this module. What only the stages need is imported where they run: torch
# alone takes seconds.
if TYPE_CHECKING:
    from omni.plan.plan import Split
    from omni.plan.stream_order import BlockOrder
    from omni.stream.feature_cache import FeatureCache
    from omni.stream.schema import LoadedRow
    from omni.stream.stream_settings import StreamSettings

_HISTOGRAM_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
_LOADER_CPUS = 1.0


@dataclass(frozen=True)
class Share:
    """Loading tasks and encoder actors of one stream."""

    loaders: int
    encoders: int

    @classmethod
    def whole(cls, config: Config) -> Share:
        return cls(config.data.loaders, config.encoder.actor_count)


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


def make_stream(
    splits: Sequence[ray.ObjectRef[Split]],
    order: BlockOrder,
    settings: SharedSettings,
    share: Share | None = None,
) -> Dataset:
    """Build a dataset whose block k has the bins of block k of `order`, a row each.

    A block holds whole microbatches of `bins_per_block` bins. share: tasks and actors of this
    stream; None: all.
    """
    set_context()
    config, share = settings.config, share or Share.whole(settings.config)
    references: _References = {
        "order": ray.put(order),
        "splits": list(splits),
        "settings": settings.reference,
    }
    timeout = _block_timeout(config)
    stage = _LoadStage if settings.encode else _ReadStage
    _, for_encoder, for_loader = selectors(config)
    nodes: dict[str, Any] = {"label_selector": for_loader} if for_loader else {}
    loaded = block_numbers(order.blocks, for_loader).map_batches(
        stage(references, timeout),
        batch_size=None,
        batch_format="numpy",
        compute=TaskPoolStrategy(size=share.loaders),
        num_cpus=_LOADER_CPUS,
        **nodes,
    )
    if not settings.encode:
        return loaded
    return loaded.map_batches(
        _EncodeActor,
        # In a list: Ray would resolve a reference that is an argument itself.
        fn_constructor_kwargs={"settings": [settings.reference], "timeout": timeout},
        # Blocks have at least so many rows, so that each is a task of its own.
        batch_size=settings.bins_per_block,
        batch_format="pyarrow",
        # Ray Data restarts a dead actor without limit.
        compute=ActorPoolStrategy(size=share.encoders, max_tasks_in_flight_per_actor=2),
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
    set_scheduling(context)


def _cpus_unlike_loader(cpus: float) -> float:
    """Change the encoder's CPUs a little where they equal the loader's.

    Ray fuses neighbouring stages with equal resources, and loading must not block an encoder.
    """
    return cpus + 1e-3 if cpus == _LOADER_CPUS else cpus


class _References(TypedDict):
    """Objects of the load stage. Ray resolves references in a container only on request."""

    order: ray.ObjectRef[BlockOrder]
    splits: list[ray.ObjectRef[Split]]
    settings: ray.ObjectRef[StreamSettings]


class _LoadStage:
    """Turn a block's number into its bins, with cached features or, where there are none, log-mels.

    timeout: seconds for a microbatch.
    """

    def __init__(self, references: _References, timeout: float) -> None:
        self._references = references
        self._timeout = timeout

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        from omni.stream.schema import LOADED_SCHEMA

        rows = [row for rows in self._microbatches(batch) for row in rows]
        return pa.Table.from_pylist(rows, LOADED_SCHEMA)

    @property
    def _settings(self) -> StreamSettings:
        return _settings(self._references["settings"])

    def _microbatches(self, batch: dict[str, np.ndarray]) -> Iterator[list[LoadedRow]]:
        """Load the microbatches of a block, which must be used before the next is asked for."""
        import torch

        from omni.stream.stages import load_bin

        torch.set_num_threads(1)
        order: BlockOrder = _order(self._references["order"])
        [number] = batch["id"].tolist()
        planned, settings = order.block(number), self._settings
        cache = _shared_cache(settings)
        for first in range(0, len(planned), settings.bins_per_block):
            with _limited(self._timeout, settings.config, "loader"):
                rows = []
                for one in planned[first : first + settings.bins_per_block]:
                    split: Split = ray.get(self._references["splits"][one.split])
                    rows.append(load_bin(split.of_bin(one.bin), one.bin, settings, cache))
                yield rows


class _ReadStage(_LoadStage):
    """Turn a block's number into encoded bins, all of whose features the cache held at the start.

    Features that have been damaged or removed since are encoded again, in a task that asks for the
    resources of an encoder.
    """

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.concat_tables([self._encoded(rows) for rows in self._microbatches(batch)])

    def _encoded(self, rows: list[LoadedRow]) -> pa.Table:
        from omni.stream.encoded_block import encoded_block
        from omni.stream.schema import LOADED_SCHEMA

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
            "Seconds that an encoder actor takes for one microbatch.",
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
    """End this process if a microbatch takes longer than `timeout`; say before where it stands."""
    with limited(timeout), stacks_after(timeout, config.run_dir, stage, "one microbatch"):
        yield


def _block_timeout(config: Config) -> float:
    """Return the seconds allowed for one microbatch.

    Less than a rank waits: otherwise the whole worker group would restart instead of one stage.
    """
    return block_timeout(config.train.timeout_seconds)


@functools.lru_cache(maxsize=4)
def _settings(reference: ray.ObjectRef[StreamSettings]) -> StreamSettings:
    """Read the settings of a stream once per process."""
    return ray.get(reference)


@functools.lru_cache(maxsize=4)
def _order(reference: ray.ObjectRef[BlockOrder]) -> BlockOrder:
    """Read the order of a stream once per process."""
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
