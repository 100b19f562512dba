"""The stream on Ray, and behaviour of Ray Data that it and the index job rely on."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from ray.data import ExecutionOptions, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from omni.cluster.ray_internals.data import block_numbers, end_together
from omni.plan.stream_order import ListedBins
from omni.stream.encoded_block import encoded_block
from omni.stream.feature_cache import FeatureCache
from omni.stream.pipeline import Share, SharedSettings, make_stream, set_context
from omni.stream.schema import ENCODED_SCHEMA, LOADED_SCHEMA
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import StreamSettings, stream_settings
from omni.stream.streams import Streams
from tests.helpers.stream_order import held_bins, planned_stream
from tests.helpers.worker_specs import small_run

ROWS, BLOCKS, ROW_BYTES = 4, 6, 1 << 19
SMALL_TARGET = 1 << 20  # bytes; Ray Data's own is 128 MiB
LARGE_ROW = 75 << 20  # bytes; a block has 300 MiB


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=3, logging_level=logging.ERROR, **quiet)
    yield
    ray.shutdown()


def _received(row_bytes: int) -> list[list[list[int]]]:
    """Send blocks of four such rows to two ranks; return the rows of each that each receives."""

    def padded(table: pa.Table) -> pa.Table:
        [number] = table["id"].to_pylist()
        rows = list(range(number * ROWS, (number + 1) * ROWS))
        sized = pa.array([bytes(row_bytes)] * ROWS, pa.large_binary())
        return pa.table({"id": rows, "bytes": sized})

    options = ExecutionOptions(preserve_order=True)
    stream = block_numbers(BLOCKS, {}).map_batches(
        padded, batch_size=None, batch_format="pyarrow", compute=TaskPoolStrategy(size=2)
    )
    stream.context.execution_options = options
    return _read(stream.streaming_split(2, equal=True), None)


def _read(shards: Sequence[Any], rows: int | None) -> list[list[list[int]]]:
    """Read shards at the same time, so many rows at a time; return the column of numbers."""
    found: list[list[list[int]]] = [[] for _ in shards]

    def read(rank: int, shard: Any) -> None:
        blocks = shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=0)
        for block in blocks:
            name = "id" if "id" in block.column_names else "bin"
            found[rank].append(block[name].to_pylist())

    readers = [threading.Thread(target=read, args=pair) for pair in enumerate(shards)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    return found


def test_blocks_of_any_size_stay_whole_and_ranks_take_turns(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ray.data.DataContext.get_current()
    blocks = np.arange(ROWS * BLOCKS).reshape(BLOCKS, ROWS).tolist()
    set_context()
    monkeypatch.setattr(context, "target_max_block_size", SMALL_TARGET)
    cut = _received(ROW_BYTES)
    assert all(len(block) < ROWS for rank in cut for block in rank), "Ray Data cuts large blocks"
    set_context()
    for row_bytes in (8, LARGE_ROW):
        assert _received(row_bytes) == [blocks[0::2], blocks[1::2]]


class _Waiting(ExecutionCallback):
    """Note the largest number of blocks that wait behind each stage."""

    most: ClassVar[dict[str, int]] = {}

    def on_execution_step(self, executor: Any) -> None:
        for operator, state in executor._topology.items():
            waiting = state.output_queue.num_blocks
            self.most[operator.name] = max(waiting, self.most.get(operator.name, 0))


def test_block_numbers_are_made_as_they_are_needed(cluster: None) -> None:
    """The stream of a long run begins like that of a short one."""
    set_context()
    stream = block_numbers(10**7, {}).map_batches(
        lambda batch: batch, batch_size=None, compute=TaskPoolStrategy(size=2)
    )
    stream.context.execution_options.preserve_order = True
    stream.context.custom_execution_callback_classes.append(_Waiting)
    blocks = iter(stream.iter_batches(batch_size=None, prefetch_batches=0))
    assert [next(blocks)["id"].tolist() for _ in range(300)] == [[n] for n in range(300)]
    time.sleep(2)  # Nothing is read meanwhile, and nothing need be made.
    del blocks
    assert 0 < _Waiting.most["ReadBlockNumbers"] < 300


def test_groups_of_ranks_have_streams_of_their_own(cluster: None) -> None:
    """Four ranks on two nodes, in blocks of several steps: each gets the bins of its rank."""
    prepared = small_run()
    config = prepared.config
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"loaders": 2, "cache": None}),
            "encoder": config.encoder.model_copy(update={"actors": 2, "cpus": 0.1}),
            "optim": config.optim.model_copy(update={"bins_per_step": 5, "steps": 4}),
        }
    )
    settings = SharedSettings.put(stream_settings(config, prepared.encoder))
    splits = list(prepared.splits.values())
    references = [ray.put(split) for split in splits]
    streams = Streams(references, settings, 1, 2, Share(2, 2), steps_per_block=2)
    per_block = config.optim.bins_per_block
    iterators: list[Any] = streams.iterators(["a", "a", "b", "b"])
    # As Ray Train sends it to the first rank.
    first = iterators[0] = pickle.loads(pickle.dumps(iterators[0]))
    assert isinstance(first._coord_actor, ray.actor.ActorHandle)
    found = _read(iterators, per_block)
    planned = [one.bin for one in planned_stream(splits, (1, 2, 4), 4, per_block)]
    blocks = [planned[n : n + per_block] for n in range(0, len(planned), per_block)]
    assert found == [blocks[rank::4] for rank in range(4)]


def test_ray_train_ends_the_streams_of_all_ranks(cluster: None) -> None:
    """It knows the coordinator of the first rank alone."""
    set_context()
    streams = [
        block_numbers(10**6, {}).map_batches(lambda batch: batch).streaming_split(2, equal=True)
        for _ in range(2)
    ]
    iterators: list[Any] = [shard for stream in streams for shard in stream]
    coordinators = [iterators[0]._coord_actor, iterators[2]._coord_actor]
    readers = [iter(shard.iter_batches(batch_size=None)) for shard in iterators]
    with ThreadPoolExecutor(4) as pool:  # The ranks of a stream begin together.
        list(pool.map(next, readers))
    assert not any(ray.get([c.__ray_call__.remote(_has_ended) for c in coordinators]))
    joined: Any = end_together(iterators)[0]
    ray.get(joined._coord_actor.shutdown_executor.remote())
    assert ray.get([c.__ray_call__.remote(_has_ended) for c in coordinators]) == [True, True]


def _has_ended(coordinator: Any) -> bool:
    executor = coordinator._current_executor
    return executor is None or executor._shutdown


def test_every_item_is_a_task_of_its_own(cluster: None) -> None:
    def make(batch: pa.Table) -> dict[str, Any]:
        return {"length": [len(batch)], "data": batch["task"].to_pylist()[:1]}

    items = [{"task": bytes([n, 0])} for n in range(5)]
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        make, batch_size=1, batch_format="pyarrow"
    )
    rows = made.take_all()
    assert [row["length"] for row in rows] == [1] * 5
    assert sorted(row["data"] for row in rows) == [item["task"] for item in items]


_TIMES = {"load_seconds", "encode_seconds"}


def _encoder_actors() -> int:
    """Encoder actors that this cluster has had."""
    actors = ray._private.state.actors().values()
    return sum("_EncodeActor" in actor["ActorClassName"] for actor in actors)


def _streamed(settings: StreamSettings, microbatches: int = 1) -> list[dict[str, Any]]:
    """Send the held-out bins through the stream, so many microbatches to a block."""
    split = small_run().splits["dev"]
    bins = np.asarray(held_bins(split, 1, settings.bins_per_block))
    order = ListedBins(bins, settings.bins_per_block * microbatches)
    stream = make_stream([ray.put(split)], order, SharedSettings.put(settings))
    stream.context.execution_options.preserve_order = True
    blocks = stream.iter_batches(batch_size=settings.bins_per_block, batch_format="pyarrow")
    tables = [pa.table(block) for block in blocks]
    assert all(table.schema.equals(ENCODED_SCHEMA) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


@contextlib.contextmanager
def _first_killed(task: str) -> Iterator[list[int]]:
    """Kill the first process that runs such a task; its pid is in the list afterwards."""
    killed: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not killed and not done.wait(0.01):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if task in " ".join(process.cmdline()) and not killed:
                        process.kill()
                        killed.append(process.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def test_a_stream_whose_features_are_all_cached_has_no_encoder(
    cluster: None, tmp_path: Path
) -> None:
    """It sends the same blocks, also where a loader is killed, or features are damaged."""
    prepared, folder, before = small_run(), tmp_path / "features", _encoder_actors()
    settings = stream_settings(prepared.config, prepared.encoder)
    settings = replace(settings, cache=str(folder))
    split = prepared.splits["dev"]
    stage = EncodeStage(settings)
    bins = held_bins(split, 1, settings.bins_per_block)
    for number in bins:
        stage(pa.Table.from_pylist([load_bin(split, number, settings, None)], LOADED_SCHEMA))
    del stage  # It writes what is pending.
    cache = FeatureCache(folder)
    expected = [
        encoded_block([load_bin(split, number, settings, cache)], settings, {}).to_pylist()[0]
        for number in bins
    ]
    assert all(row["features"] for row in expected if row["ids"])
    with _first_killed("MapBatches(_ReadStage)") as killed:
        found = _streamed(replace(settings, encode=False))
    assert len(killed) == 1
    assert _encoder_actors() == before
    for shard in folder.glob("*.bin"):
        shard.write_bytes(bytes(shard.stat().st_size))
    lost = _streamed(replace(settings, encode=False))
    assert _encoder_actors() == before
    assert sum(row["encoded_samples"] for row in found) == 0
    assert sum(row["encoded_samples"] for row in lost) > 0
    for rows in (found, lost):
        for row, other in zip(rows, expected, strict=True):
            for name in row.keys() - _TIMES - {"encoded_samples"}:
                assert row[name] == other[name], name
    assert len(FeatureCache(folder).get(cache)) == len(cache), "what was damaged is kept again"
    assert [row["features"] for row in _streamed(settings, 2)] == [r["features"] for r in expected]
    assert _encoder_actors() == before + 1
