"""Start a local Ray cluster, or connect to one that runs."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import ray

from omni.cluster.versions import forwarded_variables
from omni.config import Config


def start_ray(config: Config) -> None:
    """Connect to the cluster (RAY_ADDRESS, or a running driver), or start a local one.

    A local one gets at least as many logical CPUs as the stages ask for. They are shares of the
    real ones, and a stage without any would never run.
    """
    # Workers log through the run directory; Ray's copies would print each line twice.
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
        # Stages share cores: Ray need not warn about the number of processes.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        t, e, d = config.train, config.encoder, config.data
        need = t.most * t.cpus + e.actor_count * e.cpus + d.loaders + 1
        options |= {
            "address": "local",  # Without it, Ray may connect to a cluster that once ran here.
            "num_cpus": max(os.cpu_count() or 1, int(np.ceil(need))),
            "include_dashboard": False,
        }
    ray.init(**options)


def runtime_environment() -> dict[str, Any]:
    """Return the environment variables of workers: sources of weights, and no secrets.

    Ray shows a runtime environment to everyone who sees its dashboard. URLs with credentials are
    left out; they belong into the environment of the nodes.
    """
    variables = forwarded_variables()
    # The request of a killed driver would halve the next one's share for three minutes.
    variables["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"
    if os.environ.get("RAY_ADDRESS"):  # Several clusters may run on this machine.
        variables["RAY_ADDRESS"] = os.environ["RAY_ADDRESS"]
    return {"env_vars": variables}
