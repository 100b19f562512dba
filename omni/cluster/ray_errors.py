"""Say in one line why a Ray task, actor or node failed."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError

from omni.errors import first_line


def ray_reason(error: RayError) -> str:
    """Return the exception of a task, which ends its text, or Ray's own reason, which begins it."""
    if isinstance(error, RayTaskError):
        return str(error).strip().splitlines()[-1]
    return first_line(error)
