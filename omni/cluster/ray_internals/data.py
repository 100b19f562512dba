"""Private APIs of Ray Data."""

from __future__ import annotations

import time
from typing import Any

from ray.data import Dataset, read_datasource
from ray.data._internal.datasource.range_datasource import RangeDatasource
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators import actor_pool_map_operator

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05  # seconds


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

    def on_execution_step(self, executor: Any) -> None:
        """Back off while the scheduler is idle.

        While every stage waits for the trainer no task is active, and the scheduler then loops
        without waiting: 40 % of a core that two-core machines need for training.
        """
        metrics = [operator.metrics for operator in executor._topology]
        progress = sum(m.num_tasks_submitted + m.num_outputs_of_finished_tasks for m in metrics)
        if progress == self._progress:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _SHORTEST_PAUSE
        self._progress = progress


def row_numbers(
    rows: int, blocks: int, concurrency: int, label_selector: dict[str, str]
) -> Dataset:
    """Build a dataset of 0 to rows - 1 in the column "id", as `ray.data.range` does.

    That function has no parameter for the nodes on which its tasks run.
    """
    made: Dataset = read_datasource(
        RangeDatasource(n=rows, block_format="arrow", column_name="id"),
        concurrency=concurrency,
        override_num_blocks=blocks,
        ray_remote_args={"label_selector": label_selector} if label_selector else None,
    )
    return made
