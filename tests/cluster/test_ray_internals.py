"""All uses of Ray's private APIs are in one package, which names the release that has them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = ("Run", "RunAttempt", "Worker")
"""What Ray Train's page lists."""
_PRIVATE = re.compile(r"^\s*(from|import) ray[\w.]*\._|\bray\._(?!_)\w+", re.M)


def test_private_apis_of_ray_are_in_one_package() -> None:
    users = {
        str(path.parent.relative_to(ROOT))
        for folder in ("omni", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if _PRIVATE.search(path.read_text())
    }
    assert users == {"omni/cluster/ray_internals"}


def test_the_local_trainer_replaces_a_method_that_ray_train_calls() -> None:
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    from omni.cluster.ray_internals.train import LocalTrainer, LocalWorkerGroup, Trainer

    names = [name for name in vars(LocalTrainer) if inspect.isfunction(vars(LocalTrainer)[name])]
    assert len(names) == 2
    for name in names:
        assert callable(getattr(Trainer, name))
        assert f"self.{name}(" in inspect.getsource(Trainer)
    assert "self.worker_group_cls.create(" in inspect.getsource(TrainController)
    [name] = (name for name in vars(LocalWorkerGroup) if name.endswith("runtime_env"))
    assert f"self.{name}(" in inspect.getsource(WorkerGroup)


def test_reports_to_ray_train_would_wait_and_show_nothing() -> None:
    """Reasons why `ray.train.report` is not called. Where one falls, see docs/architecture.md."""
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.worker_group import worker
    from ray.train.v2._internal.state import schema

    rows = [getattr(schema, f"{kind}Train{row}") for kind in ("", "Decorated") for row in ROWS]
    shown = {name for row in rows for name in row.model_fields}
    assert {"status", "attempts", "workers", "gpus"} <= shown
    assert not {name for name in shown if "metric" in name or "report" in name}
    assert constants.DEFAULT_COLLECTIVE_TIMEOUT_S is None
    assert "result_queue=queue.Queue(maxsize=1)" in inspect.getsource(worker)


def test_another_release_of_ray_is_refused() -> None:
    code = "import ray; ray.__version__ = '2.61.0'; import omni.cluster.ray_internals"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"RuntimeError: ray 2\.61\.0: expected 2\.60", done.stderr)
