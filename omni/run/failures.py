"""Find the root cause of a failed attempt, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from omni.metrics.run_files import last_line

_MAX_SUSPECTS = 3
_MAX_IDS = 20
"""Utterance ids in a message; events.jsonl has all of them."""


def is_cluster_lost(error: BaseException) -> bool:
    """Tell whether Ray itself is gone, rather than a worker."""
    return isinstance(error, (SystemExit, ConnectionError, ray.exceptions.RaySystemError))


def is_without_room(error: BaseException) -> bool:
    """Tell whether the workers of a group could not be placed within Ray Train's start timeout."""
    from omni.cluster.ray_internals.train import is_start_timeout

    return is_start_timeout(getattr(error, "controller_failure", None))


def is_preempted(error: BaseException) -> bool:
    """Tell whether a worker ended because its node was taken away."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures.values()]
    return any(isinstance(c, ray.exceptions.RayActorError) and c.preempted for c in causes)


def root_cause(error: BaseException, events: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first failure of a worker: rank, error, step, bins and utterances.

    events: those of this attempt. Ranks that wait for a failed rank fail later, for lack of it.
    """
    failed = [row for row in events if row["event"] == "rank failed"]
    suspects = _suspects(events)
    if failed:
        first = min(failed, key=lambda row: float(row["time"]))
        others = [row for row in suspects if row["rank"] != first["rank"]]
        return f"rank {first['rank']}: {first['reason']}{_position(first)}{_named(others)}"
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return f"{type(error).__name__}: {last_line(error)}{_named(suspects)}"
    rank, cause = min(failures.items(), key=lambda failure: failure[0])
    while (deeper := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = deeper
    return f"rank {rank}: {type(cause).__name__}: {last_line(cause)}{_named(suspects)}"


def _suspects(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what ranks without progress were last at; those that waited for others are left out.

    Where all of them waited, or none was slow, there are none.
    """
    newest = {row["rank"]: row for row in events if row["event"] == "slow"}
    last = max((row["step"] for row in newest.values()), default=0)
    slow = [newest[rank] for rank in sorted(newest)]
    return [row for row in slow if row["step"] == last and not row["waits_for_ranks"]]


def _named(suspects: Sequence[Mapping[str, Any]]) -> str:
    shown = "; ".join(str(row["reason"]) for row in suspects[:_MAX_SUSPECTS])
    return f"; no progress before: {shown} (hangs/ has the stacks)" if shown else ""


def _position(row: Mapping[str, Any]) -> str:
    """Describe step, bins and utterances of a failed rank; empty before its first block."""
    bins, ids = row["bins"], row["ids"]
    if not bins:
        return ""
    more = ", ..." if len(ids) > _MAX_IDS else ""
    return (
        f" (step {row['step']}, bins {', '.join(map(str, bins))}, utterances "
        f"{', '.join(ids[:_MAX_IDS])}{more})"
    )
