"""Behaviour of Ray Data that the stream and the index job rely on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data import ExecutionOptions, TaskPoolStrategy

from omni.stream.pipeline import set_context

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
