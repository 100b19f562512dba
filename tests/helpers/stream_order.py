"""The order of a stream that all ranks read, as tests without Ray need it."""

from __future__ import annotations

from collections.abc import Iterable

from omni.plan.plan import Split
from omni.plan.stream_order import PlannedBin, Ranks, StreamOrder


def planned_stream(
    splits: Iterable[Split], steps: tuple[int, int, int], world: int = 1, bins_per_block: int = 1
) -> list[PlannedBin]:
    """List the bins of a stream. steps: the first, the held-out one, the end."""
    plans = {split.name: split.plan for split in splits}
    return list(StreamOrder.of(plans, Ranks.all(world), bins_per_block, steps).all_bins())


def held_bins(split: Split, world: int, bins_per_block: int) -> list[int]:
    """List a held-out split's bins, filled up to whole blocks for all ranks."""
    plans = {"train": split.plan, split.name: split.plan}
    order = StreamOrder.of(plans, Ranks.all(world), bins_per_block, (0, 0, 0))
    return [planned.bin for planned in order.all_bins()]
