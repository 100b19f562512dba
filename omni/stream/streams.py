"""Streams of one attempt: one for each group of ranks, with its share of loaders and encoders.

A stream's coordinator is one process, which would have to feed the ranks of all nodes otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.data import DataIterator, ExecutionOptions, ExecutionResources
from ray.train import DataConfig

from omni.cluster.ray_internals.data import end_together
from omni.stream.pipeline import Share, SharedSettings, make_stream

if TYPE_CHECKING:
    from omni.plan.plan import Split

STREAM = "stream"
"""Name under which ranks ask for their stream."""
_STORE_SHARE = 0.5
"""Share of the object store for the blocks of all streams: Ray Data's own limit for each."""


@dataclass(frozen=True)
class Streams:
    """Streams of an attempt that trains from `first_step` on.

    splits: references to `Split`s in the object store. held_step: step after which the held-out
    bins come. room: loaders and encoders for which the cluster has room at the start.
    """

    splits: list[ray.ObjectRef[Split]]
    settings: SharedSettings
    first_step: int
    held_step: int
    room: Share
    steps_per_block: int = 1

    def iterators(self, nodes: Sequence[str]) -> list[DataIterator]:
        """Start the streams; return the iterator of each rank. nodes: that of each rank."""
        from omni.plan.stream_order import (
            Ranks,
            StreamOrder,
            apportion,
            count_streams,
            rank_groups,
        )

        config, room = self.settings.config, self.room
        encoders = room.encoders if self.settings.encode else None
        count = count_streams(len(set(nodes)), config.data.streams, room.loaders, encoders)
        groups = rank_groups(nodes, count)
        if len(groups) == 1:
            # What has no room yet may find some later, and a stream begins with a part of it.
            room = Share.whole(config)
        sizes = [len(group) for group in groups]
        shares = map(Share, apportion(room.loaders, sizes), apportion(room.encoders, sizes))
        plans = {split.name: split.plan for split in ray.get(self.splits)}
        steps = (self.first_step, self.held_step, config.optim.steps)
        found: dict[int, DataIterator] = {}
        for group, share in zip(groups, shares, strict=True):
            order = StreamOrder.of(
                plans,
                Ranks(len(nodes), group),
                config.optim.bins_per_block,
                steps,
                self.steps_per_block,
            )
            stream = make_stream(self.splits, order, self.settings, share)
            stream.set_name(STREAM)
            share_of_ranks = len(group) / len(nodes)
            stream.context.execution_options = _options(config.data.buffer_mb, share_of_ranks)
            found |= zip(group, stream.streaming_split(len(group), equal=True), strict=True)
        return end_together([found[rank] for rank in range(len(nodes))])


def _options(buffer_mb: int | None, share: float) -> ExecutionOptions:
    """Keep the order of blocks, and bound their memory: this share of that of all streams."""
    options = ExecutionOptions(preserve_order=True)
    limit = None if buffer_mb is None else float(buffer_mb << 20)
    if limit is None and share < 1:
        limit = _STORE_SHARE * ray.cluster_resources().get("object_store_memory", 0.0)
    if limit:
        options.resource_limits = ExecutionResources.for_limits(object_store_memory=limit * share)
    return options


class StreamConfig(DataConfig):
    """Let Ray Train give each rank its iterator of `Streams`, in place of a dataset."""

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: list[str] | None,
        **_: Any,
    ) -> list[dict[str, DataIterator]]:
        nodes = worker_node_ids or [""] * world_size
        streams: Streams = datasets[STREAM]
        return [{STREAM: iterator} for iterator in streams.iterators(nodes)]
