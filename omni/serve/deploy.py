"""Start and stop the server: replicas of a checkpoint and the HTTP interface, on Ray Serve."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from threading import Event
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from omni.errors import ConfigError, first_line
from omni.serve.api import make_app
from omni.serve.replica import Replica, Replicas
from omni.serve.settings import ServeSettings

APP = "omni"
_IN_FLIGHT = 32
"""Requests that a replica prepares at a time; their pieces share batches."""
_STOP_SECONDS = 60.0
"""Seconds that answers may take to end when the server does."""


class Front:
    """The HTTP interface in front of the replicas."""

    def __init__(self, handle: Any, settings: ServeSettings) -> None:
        self._model, self._settings = Replicas(handle), settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._model, self._settings)


def build(settings: ServeSettings) -> Any:
    """Build the application of Ray Serve."""
    replica = serve.deployment(
        name="model",
        num_replicas=settings.replicas,
        max_ongoing_requests=_IN_FLIGHT,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )(Replica)
    front = serve.deployment(
        name="http",
        max_ongoing_requests=10_000,  # Those that wait for the model are counted there.
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Front))
    return front.bind(replica.bind(settings), settings)


def start(settings: ServeSettings) -> str:
    """Start Ray, or connect to RAY_ADDRESS, and the server; return its address.

    Raises ConfigError where the cluster has too little or a server of its own, RuntimeError where
    the replicas do not start.
    """
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        need = round(settings.replicas * settings.cpus) + 2
        cpus = max(os.cpu_count() or 1, need)
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    ray.init(**options)
    try:
        _check_cluster(settings)
        serve.start(
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"log_level": logging.ERROR},
        )
        serve.run(build(settings), name=APP, route_prefix="/", blocking=False)
    except ConfigError:
        ray.shutdown()
        raise
    except Exception as error:
        shut_down()
        raise RuntimeError(f"the server did not start: {first_line(error)}") from error
    return f"http://{settings.host}:{settings.port}"


def _check_cluster(settings: ServeSettings) -> None:
    """Raise ConfigError where the replicas have no room, or Ray Serve has other applications."""
    there = ray.cluster_resources()
    for name, resource, each in (
        ("gpus", "GPU", settings.gpus),
        ("cpus", "CPU", settings.cpus),
    ):
        needed = settings.replicas * each
        if needed > there.get(resource, 0):
            raise ConfigError(
                f"--replicas, --{name}: {settings.replicas} of {each:g} need {needed:g} "
                f"{resource}; there are {there.get(resource, 0):g}"
            )
    status = serve.status()
    if status.applications or status.proxies:
        raise ConfigError(
            "RAY_ADDRESS: Ray Serve runs on this cluster already, with an address and applications "
            "of its own; expected a cluster without it"
        )


def wait_for_signal(stop: Callable[[], None]) -> None:
    """Wait for Ctrl-C or SIGTERM, then call `stop`."""
    asked = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    while not asked.wait(1):
        pass
    stop()


def shut_down() -> None:
    """End the server after the answers that it is writing, and the cluster if it is our own."""
    with contextlib.suppress(Exception):  # It may not have started, or not end in time.
        serve.delete(APP)
        if os.environ.get("RAY_ADDRESS"):
            serve.shutdown()
    ray.shutdown()
