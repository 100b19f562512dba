"""One thread per test process: results repeat to the last bit and small machines stay usable."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
# Ray runs its workers at niceness 15: beside a second test process on two cores they would starve.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

# For buckets on loopback; Ray's workers inherit them.
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

import pytest
import torch

torch.set_num_threads(1)

pytest_plugins = [
    *("tests.helpers.recordings", "tests.helpers.encoder", "tests.helpers.tiny_run"),
    "tests.helpers.places",
]

RAY_FIXTURES = {"cluster", "undisturbed"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start Ray, and those that need neither Ray nor minutes as `unit`."""
    for item in items:
        if RAY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("ray")
        if not any(item.get_closest_marker(name) for name in ("ray", "slow")):
            item.add_marker("unit")
