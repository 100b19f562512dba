"""One line says why Ray failed: the task's own exception, or Ray's reason before its advice."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError

from omni.cluster.ray_errors import ray_reason


def test_the_reason_is_the_exception_of_a_task_or_the_first_line_of_ray() -> None:
    cause = ValueError("no space left")
    text = "ray::make() (pid=1)\n  File x, line 1\nValueError: no space left"
    assert ray_reason(RayTaskError("make", text, cause)) == "ValueError: no space left"
    died = RayActorError(error_msg="The actor died: out of memory.\nSet RAY_x to see more.")
    assert ray_reason(died) == "The actor died: out of memory."
