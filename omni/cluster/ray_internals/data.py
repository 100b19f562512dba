"""Private APIs of Ray Data."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from ray.data import (
    DataContext,
    DataIterator,
    Dataset,
    Datasource,
    ReadTask,
    read_datasource,
)
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data.block import BlockMetadata

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05  # seconds
_BLOCKS_PER_TASK = 16_384
"""Block numbers that one task makes: few enough to be made again where its node is lost."""
_AHEAD = 16
"""Block numbers that wait for a loading task at most."""
_NUMBER_BYTES = 8


class SchedulerWorkarounds(ExecutionCallback):
    """Change behaviour of Ray Data's scheduler that it has no settings for."""

    _progress = -1
    _pause = _SHORTEST_PAUSE

    def before_execution_starts(self, executor: Any) -> None:
        """Let encoders work on a node that is draining.

        Ray Data gives them no more blocks. Where they are the only encoders, the trainers never get
        the blocks that end their step, and write no checkpoint before the node goes.
        """
        actor_pool_map_operator.get_draining_nodes = dict  # type: ignore[attr-defined]
        # Ray Data would join all that a task yields where blocks have no largest size.
        for operator in filter(_makes_block_numbers, executor._topology):
            for function in operator._map_transformer._transform_fns:
                function._disable_block_shaping = True

    def on_execution_step(self, executor: Any) -> None:
        """Back off while the scheduler is idle.

        While every stage waits for the trainer no task is active, and the scheduler then loops
        without waiting: 40 % of a core that two-core machines need for training.
        """
        metrics = [operator.metrics for operator in executor._topology]
        progress = sum(m.num_tasks_submitted + m.num_task_outputs_generated for m in metrics)
        if progress == self._progress:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _SHORTEST_PAUSE
        self._progress = progress


class FewBlockNumbers(BackpressurePolicy):
    """Take block numbers from their task as they are needed.

    They have no size to speak of, so that Ray Data would take those of the whole run at once.
    """

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        if not _makes_block_numbers(op):
            return None
        waiting = self._topology[op].output_queue.num_blocks
        return max(0, _AHEAD - waiting) * _NUMBER_BYTES


def set_scheduling(context: DataContext) -> None:
    """Change how Ray Data schedules what is executed in this context."""
    if SchedulerWorkarounds not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(SchedulerWorkarounds)
    policies = [*ENABLED_BACKPRESSURE_POLICIES, FewBlockNumbers]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)


class BlockNumbers(Datasource):
    """Numbers from 0 to blocks - 1 in the column "id", one to a block, made as they are needed.

    `ray.data.range` makes an object of each block before the first is read.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    def estimate_inmemory_data_size(self) -> int:
        return _NUMBER_BYTES * self._blocks

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(functools.partial(_numbers, numbers), _metadata(numbers), _NUMBER_SCHEMA)
            for numbers in self.spans()
        ]

    def spans(self) -> list[range]:
        """List the numbers of each task."""
        everything = range(self._blocks)
        return [everything[n : n + _BLOCKS_PER_TASK] for n in everything[::_BLOCKS_PER_TASK]]


_NUMBER_SCHEMA = pa.schema([("id", pa.int64())])


def _numbers(numbers: range) -> Iterator[pa.Table]:
    for number in numbers:
        yield pa.table({"id": [number]}, _NUMBER_SCHEMA)


def _metadata(numbers: range) -> BlockMetadata:
    size = _NUMBER_BYTES * len(numbers)
    return BlockMetadata(num_rows=len(numbers), size_bytes=size, input_files=None, exec_stats=None)


def _makes_block_numbers(operator: Any) -> bool:
    return bool(operator.name == f"Read{BlockNumbers(0).get_name()}")


def block_numbers(blocks: int, label_selector: dict[str, str]) -> Dataset:
    """Build a dataset of block numbers, whose task takes no CPU."""
    source = BlockNumbers(blocks)
    made: Dataset = read_datasource(
        source,
        concurrency=1,
        override_num_blocks=max(1, len(source.spans())),
        num_cpus=0,
        label_selector=label_selector or None,
    )
    return made


class _Coordinators:
    """Coordinators of several streams, in the place of one that Ray Train ends.

    Where it is sent to, it is that one alone.
    """

    def __init__(self, first: Any, others: Sequence[Any]) -> None:
        self._first, self._others = first, others

    @property
    def shutdown_executor(self) -> _Coordinators:
        return self

    def remote(self) -> Any:
        """End all streams; return the reference of the first."""
        for coordinator in self._others:
            coordinator.shutdown_executor.remote()
        return self._first.shutdown_executor.remote()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._first,)


def _itself(value: Any) -> Any:
    return value


def end_together(iterators: list[DataIterator]) -> list[DataIterator]:
    """Let Ray Train end the streams of all ranks, of which it knows that of the first rank alone.

    A stream that is not ended goes on until its process ends, and writes no features then.
    """
    found: list[Any] = list(iterators)
    handles = {iterator._coord_actor._actor_id: iterator._coord_actor for iterator in found}
    first = found[0]._coord_actor
    others = [handle for id, handle in handles.items() if id != first._actor_id]
    if others:
        found[0]._coord_actor = _Coordinators(first, others)
    return found
