"""Time limits of a run, all from `train.timeout_seconds`, in the order in which they must end.

A limit that ended before the one of its cause would end the process that waits, and the process
that hangs would go unnamed with it.
"""

from __future__ import annotations


def block_timeout(seconds: float) -> float:
    """Return the limit of one microbatch in a loader or encoder: another takes it, no rank ends."""
    return 0.5 * seconds


def collective_timeout(seconds: float) -> float:
    """Return the limit of a collective call.

    Ranks have written their stacks by then (three quarters of `rank_timeout`), so that the one
    which did not join is known.
    """
    return seconds


def rank_timeout(seconds: float) -> float:
    """Return the limit of a rank's step, for a rank that hangs outside of collective calls."""
    return 1.1 * seconds


def health_timeout(seconds: float) -> float:
    """Return the limit of Ray Train's health check, for a process that answers nothing."""
    return 1.25 * seconds
