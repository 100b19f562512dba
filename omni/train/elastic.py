"""How many workers a cluster has room for, beside the encoders that feed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Bundle = Mapping[str, float]


@dataclass(frozen=True)
class Node:
    id: str
    resources: Bundle
    leaving: bool = False  # announced to be taken away


def workers_that_fit(
    nodes: Sequence[Node],
    *,
    least: int,
    most: int,
    worker: Bundle,
    encoder: Bundle,
    encoders: int,
    loader: Bundle,
    loaders: int,
) -> int:
    """The largest number of workers, `least` to `most`, that leaves room for all encoders and
    loaders; where there is none, for one of each. 0 where not even that fits.

    One loader more is counted than will run: Ray does not place things as tightly as this does.
    """
    free = [node.resources for node in nodes if not node.leaving]
    for pool, tasks in ((encoders, loaders), (1, 1)):
        for workers in range(most, least - 1, -1):
            if _packs(free, [worker] * workers + [encoder] * pool + [loader] * (tasks + 1)):
                return workers
    return 0


def _packs(free: Sequence[Bundle], bundles: Sequence[Bundle]) -> bool:
    """First fit, largest first."""
    left = [dict(node) for node in free]
    for bundle in sorted(bundles, key=lambda b: (-b.get("GPU", 0.0), -b.get("CPU", 0.0))):
        for node in left:
            if all(node.get(name, 0.0) >= need - 1e-9 for name, need in bundle.items()):
                for name, need in bundle.items():
                    node[name] = node.get(name, 0.0) - need
                break
        else:
            return False
    return True
