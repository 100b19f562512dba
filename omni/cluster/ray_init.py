"""Start a local Ray cluster, or connect to one that runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray

from omni.cluster.ray_internals.core import can_reach, longest_socket_name
from omni.cluster.stacks import HANGS
from omni.cluster.timeouts import health_timeout
from omni.cluster.versions import forwarded_variables
from omni.config import Config
from omni.errors import ConfigError, first_line

_ADDRESS_SECONDS = 15.0  # A cluster that starts just now gets this long to answer.
_COORDINATORS = 6
"""Processes of Ray Train and Ray Data that ask for no CPU. Ray starts as many processes in advance
as there are CPUs, side by side; without these, one after the other."""
_own_nodes: set[str] = set()
"""Ids of the nodes of local clusters that this process has started."""
_LONGEST_SOCKET = 107  # bytes of the name of a socket, on Linux


def start_ray(config: Config) -> None:
    """Connect to the cluster (RAY_ADDRESS, or a running driver), or start a local one.

    A local one gets at least as many logical CPUs as the stages ask for. They are shares of the
    real ones, and a stage without any would never run.
    """
    _set_train_variables(config)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A submitted job may have set the same variables; Ray would refuse to merge them.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    environment = runtime_environment(config)
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
        options["runtime_env"] = environment
    else:
        _check_temporary_folder()
        # Workers inherit them. A runtime environment would make Ray start all workers anew.
        os.environ.update(environment["env_vars"])
        # Stages share cores: Ray need not warn about the number of processes.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        # Ray would end an idle process for each that it starts, and start another in its place.
        os.environ.setdefault("RAY_num_workers_soft_limit", "16")
        t, e, d = config.train, config.encoder, config.data
        need = t.most * t.cpus + e.actor_count * e.cpus + d.loaders + 1 + _COORDINATORS
        options |= {
            "address": "local",  # Without it, Ray may connect to a cluster that once ran here.
            "num_cpus": max(os.cpu_count() or 1, int(np.ceil(need))),
            "include_dashboard": False,
        }
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise RuntimeError(f"RAY_ADDRESS: {first_line(error)}") from error
    except Exception as error:  # Ray has no class for it.
        if "timed out during startup" not in str(error):
            raise
        raise RuntimeError(
            "Ray's processes did not start within 30 s: this machine is too busy; try again later"
        ) from error
    if "address" in options:
        _own_nodes.add(ray.get_runtime_context().get_node_id())


def owns_cluster() -> bool:
    """Tell whether `start_ray` of this process started the cluster that it is connected to."""
    return ray.get_runtime_context().get_node_id() in _own_nodes


def _set_train_variables(config: Config) -> None:
    """Set the variables by which Ray Train is configured; its processes get them from here."""
    timeout = max(1, round(health_timeout(config.train.timeout_seconds)))
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Attempts watches for nodes that are about to leave.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Workers log through the run directory; Ray's copies would print each line twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Its controller calls ray.get in a coroutine, of which Ray would warn.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")


def _check_address(address: str) -> None:
    """Raise ConfigError for what is not a cluster's address, RuntimeError for one that is gone."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ConfigError(
            f"RAY_ADDRESS: expected HOST:PORT of a cluster's head node (such as 10.0.0.1:6379), "
            f"got {address!r}"
        )
    if not can_reach(f"{host}:{port}", _ADDRESS_SECONDS):
        raise RuntimeError(
            f"RAY_ADDRESS: no cluster answers at {address} within {_ADDRESS_SECONDS:g} s: start "
            "it, or unset RAY_ADDRESS to use this machine alone"
        )


def _check_temporary_folder() -> None:
    """Raise ConfigError where the sockets of a local cluster would have too long names."""
    name = longest_socket_name()
    if (excess := len(os.fsencode(name)) - _LONGEST_SOCKET) > 0:
        setting = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ConfigError(
            f"{setting}: {os.environ.get(setting)} is {excess} bytes too long for the names of "
            f"Ray's sockets in it ({_LONGEST_SOCKET} bytes at most): set RAY_TMPDIR to a shorter "
            "path, such as /tmp"
        )


def runtime_environment(config: Config) -> dict[str, Any]:
    """Return the environment variables of workers: sources of weights, and no secrets.

    Ray shows a runtime environment to everyone who sees its dashboard. URLs with credentials are
    left out; they belong into the environment of the nodes.
    """
    variables = forwarded_variables()
    # The request of a killed driver would halve the next one's share for three minutes.
    variables["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"
    if os.environ.get("RAY_ADDRESS"):  # Several clusters may run on this machine.
        variables["RAY_ADDRESS"] = os.environ["RAY_ADDRESS"]
    return {"env_vars": variables | _flight_recorder(config)}


def _flight_recorder(config: Config) -> dict[str, str]:
    """Let NCCL write its last collective calls when one times out: hangs/nccl-RANK.

    `python -m torch.distributed.flight_recorder.fr_trace` names the rank that did not join.
    """
    if not config.train.gpus or not isinstance(config.run_dir, Path):
        return {}
    prefix = str(config.run_dir / HANGS / "nccl-")
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,  # as torch before 2.10 names it
    }
