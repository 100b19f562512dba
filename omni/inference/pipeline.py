"""Ray Data pipeline of inference: shards of an index -> load (tasks) -> encode, generate and write
(actors). With one process instead, the same steps run one after another."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from omni.config import Config
from omni.corpus.index_row import IndexRow
from omni.errors import ConfigError
from omni.inference.features import open_cache
from omni.inference.shards import (
    Decoder,
    Shard,
    cut_shards,
    load_rows,
    transcribe_shard,
    transcripts,
)
from omni.inference.transcriber import Transcript
from omni.storage.path import StoragePath, join
from omni.stream.feature_cache import FeatureCache

_SAY_SECONDS = 5.0


@dataclass(frozen=True)
class Actors:
    """Processes of Ray that transcribe, each with a copy of the model."""

    count: int
    gpus: float = 0.0
    """GPUs of each, or a share of one."""
    cpus: float = 1.0


def transcribe_corpus(
    decoder: Decoder,
    table: pa.Table,
    folder: StoragePath,
    actors: Actors | None,
    say: Callable[[str], None],
) -> Iterator[tuple[IndexRow, Transcript | ValueError]]:
    """Transcribe the rows of an index; yield each in order with its transcript, or its error.

    folder: holds finished shards, which are not done again. actors: None for this process alone.
    Raises RuntimeError where a process or storage fails: the same call continues.
    """
    shards = cut_shards(table, folder, decoder.identity(table))
    todo = [shard for shard in shards if not shard.done]
    if len(todo) < len(shards):
        say(f"{len(shards) - len(todo):,} of {len(shards):,} shards were there already")
    if todo:
        progress = _Progress(todo, say)
        run = (
            _run_here(decoder, table, todo)
            if actors is None
            else _run_on_ray(decoder, table, todo, actors)
        )
        for first in run:
            progress.add(first)
    yield from transcripts(table, shards)


class _Progress:
    """Report rows, speed and the time that is left."""

    def __init__(self, todo: Sequence[Shard], say: Callable[[str], None]) -> None:
        self._todo = {shard.first: shard for shard in todo}
        self._total = sum(shard.seconds for shard in todo)
        self._rows, self._seconds, self._say = 0, 0.0, say
        self._all = sum(shard.count for shard in todo)
        self._began = self._shown = time.monotonic()

    def add(self, first: int) -> None:
        """Count a finished shard, by its first row."""
        shard = self._todo[first]
        self._rows += shard.count
        self._seconds += shard.seconds
        now = time.monotonic()
        if now - self._shown > _SAY_SECONDS or self._rows == self._all:
            self._shown = now
            rate = self._seconds / max(now - self._began, 1e-3)
            left = (self._total - self._seconds) / max(rate, 1e-9)
            self._say(
                f"{self._rows:,}/{self._all:,} utterances, {rate:,.1f} audio-s/s, "
                f"{left:,.0f} s left"
            )


def _run_here(decoder: Decoder, table: pa.Table, todo: Sequence[Shard]) -> Iterator[int]:
    transcriber = decoder.load()
    cache = open_cache(transcriber, decoder.cache)
    for shard in todo:
        rows = table.slice(shard.first, shard.count)
        loaded = load_rows(rows.to_pylist(), transcriber.longest_piece, cache)
        transcribe_shard(transcriber, rows, loaded, decoder, cache, shard.path)
        yield shard.first


def _run_on_ray(
    decoder: Decoder, table: pa.Table, todo: Sequence[Shard], actors: Actors
) -> Iterator[int]:
    """Run the pipeline; yield the first row of each shard that is finished."""
    import ray
    from ray.data import ActorPoolStrategy

    from omni.cluster.ray_errors import ray_reason
    from omni.cluster.ray_init import start_ray
    from omni.stream.pipeline import set_context

    if decoder.device.startswith("cuda") and not actors.gpus:
        raise ConfigError(f"--gpus: expected a share for --device {decoder.device}")
    changes = {"actors": actors.count, "cpus": actors.cpus, "gpus": actors.gpus}
    encoder = Config().encoder.model_copy(update=changes)
    start_ray(Config().model_copy(update={"encoder": encoder}))
    set_context()
    ray.data.DataContext.get_current().execution_options.preserve_order = False
    there = ray.cluster_resources()
    for name, each in (("GPU", actors.gpus), ("CPU", actors.cpus)):
        if actors.count * each > there.get(name, 0.0):
            raise ConfigError(
                f"--actors: {actors.count} of {each:g} {name} need {actors.count * each:g}; "
                f"the cluster has {there.get(name, 0.0):g}"
            )
    transcriber = decoder.load_on_driver()
    folder = None if decoder.cache is None else join(decoder.cache, transcriber.cache_folder)
    facts = LoadingFacts(transcriber.longest_piece, folder)
    del transcriber
    items = [
        {
            "first": shard.first,
            "path": pickle.dumps(shard.path),
            "rows": _ipc(table.slice(shard.first, shard.count)),
        }
        for shard in todo
    ]
    # Distinct CPUs keep Ray from fusing the stages: loading must not wait for a model.
    load: Any = _load
    stream = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            load, batch_size=1, batch_format="pyarrow", fn_kwargs={"facts": facts}, num_cpus=0.5
        )
        .map_batches(
            _DecodeActor,
            fn_constructor_kwargs={"decoder": decoder},
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors.count, max_tasks_in_flight_per_actor=2),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
        )
    )
    try:
        for row in stream.iter_rows():
            yield row["first"]
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"transcribing stopped: {ray_reason(error)}") from error


@dataclass(frozen=True)
class LoadingFacts:
    """Describe the model to loading tasks. cache: location of its encoder's features."""

    longest_piece: float
    cache: str | None


def _load(batch: pa.Table, facts: LoadingFacts) -> pa.Table:
    """Load the rows of a shard."""
    [item] = batch.to_pylist()
    rows = pa.ipc.open_stream(item["rows"]).read_all()
    loaded = load_rows(rows.to_pylist(), facts.longest_piece, _cache(facts.cache))
    return batch.append_column("loaded", pa.array([pickle.dumps(loaded)], pa.large_binary()))


@lru_cache(maxsize=2)
def _cache(location: str | None) -> FeatureCache | None:
    """Open a cache once per process."""
    return None if location is None else FeatureCache(location)


class _DecodeActor:
    """Encode, generate and write, with one copy of the model."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._transcriber = decoder.load()
        self._cache = open_cache(self._transcriber, decoder.cache)

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        [item] = batch.to_pylist()
        rows = pa.ipc.open_stream(item["rows"]).read_all()
        path: StoragePath = pickle.loads(item["path"])
        loaded = pickle.loads(item["loaded"])
        made = transcribe_shard(self._transcriber, rows, loaded, self._decoder, self._cache, path)
        return {"first": [item["first"]], **{name: [value] for name, value in made.items()}}


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    data: bytes = sink.getvalue().to_pybytes()
    return data
