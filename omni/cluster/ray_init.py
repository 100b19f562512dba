"""Start Ray, or connect to the cluster that runs."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import ray

from omni.cluster.versions import PASSED_ON
from omni.config import Config
from omni.storage.path import redact


def start_ray(config: Config) -> None:
    """Connect to the cluster (RAY_ADDRESS, or a running driver), or start a local one.

    A local one gets at least as many logical CPUs as the stages ask for: they are shares of the
    real ones, and a stage that finds none would stand still.
    """
    # Trainer processes print through our own files; Ray's copies would double each line.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A submitted job may have set the same variables; Ray would refuse to merge them.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    if ray.is_initialized():
        return
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": runtime_environment(),
    }
    if not os.environ.get("RAY_ADDRESS"):
        # A stage is a process more, not a core more: no warning about their number.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        t, e, d = config.train, config.encoder, config.data
        need = t.most * t.cpus + e.actor_count * e.cpus + d.loaders + 1
        options |= {
            "address": "local",  # not whatever cluster once ran on this machine
            "num_cpus": max(os.cpu_count() or 1, int(np.ceil(need))),
            "include_dashboard": False,
        }
    ray.init(**options)


def runtime_environment() -> dict[str, Any]:
    """What workers are told beside the job: where weights come from, and nothing secret.

    Ray shows a runtime environment to everyone who sees its dashboard: a URL with credentials stays
    out of it (set it in the nodes' own environment).
    """
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables = {name: text for name, text in given.items() if redact(text) == text}
    # A killed driver's claim on the cluster would halve the next one's share for three minutes.
    variables["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"
    if os.environ.get("RAY_ADDRESS"):  # of several clusters on a machine, the one of this run
        variables["RAY_ADDRESS"] = os.environ["RAY_ADDRESS"]
    return {"env_vars": variables}
