"""The stream on Ray, and behaviour of Ray Data that it and the index job rely on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from ray.data import ExecutionOptions, TaskPoolStrategy

from omni.plan.plan import held_bins
from omni.stream.encoded_block import encoded_block
from omni.stream.feature_cache import FeatureCache
from omni.stream.pipeline import SharedSettings, make_stream, set_context
from omni.stream.schema import ENCODED_SCHEMA, LOADED_SCHEMA
from omni.stream.stages import EncodeStage, load_bin
from omni.stream.stream_settings import StreamSettings, stream_settings
from tests.helpers.worker_specs import small_run

ROWS, BLOCKS, ROW_BYTES = 4, 6, 1 << 19
SMALL_TARGET = 1 << 20  # bytes; Ray Data's own is 128 MiB


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=3, logging_level=logging.ERROR, **quiet)
    yield
    ray.shutdown()


def _padded(table: pa.Table) -> pa.Table:
    """Add half a megabyte to every row."""
    return table.append_column("bytes", pa.array([bytes(ROW_BYTES)] * len(table)))


def _received() -> list[list[list[int]]]:
    """Send blocks of 2 MiB to two ranks; return the rows of each block that each receives."""
    options = ExecutionOptions(preserve_order=True)
    stream = ray.data.range(ROWS * BLOCKS, override_num_blocks=BLOCKS).map_batches(
        _padded, batch_size=ROWS, batch_format="pyarrow", compute=TaskPoolStrategy(size=1)
    )
    stream.context.execution_options = options
    found: list[list[list[int]]] = [[], []]

    def read(rank: int, shard: Any) -> None:
        blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        found[rank] = [block["id"].to_pylist() for block in blocks]

    shards = stream.streaming_split(2, equal=True)
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
    monkeypatch.setattr(context, "target_max_block_size", SMALL_TARGET)
    cut = _received()
    assert all(len(block) < ROWS for rank in cut for block in rank), "Ray Data cuts large blocks"
    set_context()
    assert _received() == [blocks[0::2], blocks[1::2]]


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


def _streamed(settings: StreamSettings) -> list[dict[str, Any]]:
    split = small_run().splits["dev"]
    bins = held_bins(split, 1, settings.bins_per_block)
    stream = make_stream([ray.put(split)], [(0, bins)], SharedSettings.put(settings))
    stream.context.execution_options.preserve_order = True
    blocks = stream.iter_batches(batch_size=settings.bins_per_block, batch_format="pyarrow")
    tables = [pa.table(block) for block in blocks]
    assert all(table.schema.equals(ENCODED_SCHEMA) for table in tables)
    stage = "_LoadStage" if settings.encode else "_ReadStage"
    assert f"ReadRange->MapBatches({stage})" in stream.stats(), "one task reads and loads a block"
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
    prepared, folder = small_run(), tmp_path / "features"
    settings = stream_settings(prepared.config, prepared.encoder)
    settings = replace(settings, cache=str(folder))
    split = prepared.splits["dev"]
    stage = EncodeStage(settings)
    bins = held_bins(split, 1, settings.bins_per_block).tolist()
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
    assert _encoder_actors() == 0
    for shard in folder.glob("*.bin"):
        shard.write_bytes(bytes(shard.stat().st_size))
    lost = _streamed(replace(settings, encode=False))
    assert _encoder_actors() == 0
    assert sum(row["encoded_samples"] for row in found) == 0
    assert sum(row["encoded_samples"] for row in lost) > 0
    for rows in (found, lost):
        for row, other in zip(rows, expected, strict=True):
            for name in row.keys() - _TIMES - {"encoded_samples"}:
                assert row[name] == other[name], name
    assert len(FeatureCache(folder).get(cache)) == len(cache), "what was damaged is kept again"
    assert _streamed(settings)[0]["features"] == expected[0]["features"]
    assert _encoder_actors() == 1
