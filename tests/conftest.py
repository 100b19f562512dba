"""One thread per test process: results repeat to the last bit and small machines stay usable."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
# Ray runs its workers at niceness 15: beside a second test process on two cores they would starve.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import pytest
import torch

torch.set_num_threads(1)

pytest_plugins = ["tests.helpers.recordings", "tests.helpers.encoder", "tests.helpers.tiny_run"]

RAY_FIXTURES = {"cluster", "undisturbed"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start Ray, and those that need neither Ray nor minutes as `unit`."""
    for item in items:
        if RAY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("ray")
        if not any(item.get_closest_marker(name) for name in ("ray", "slow")):
            item.add_marker("unit")
    # Clusters that start at the same moment compete for ports, so one process runs all tests with
    # Ray, and first: they mostly wait. The other tests are divided by file.
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        group = "ray" if item.path in with_ray else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path not in with_ray)
