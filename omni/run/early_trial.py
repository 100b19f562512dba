"""Try a block in the driver's process while Ray starts, which takes as long."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

import ray

from omni.run.actor_count import is_auto
from omni.run.prepare import Prepared

if TYPE_CHECKING:
    from omni.run.trial import Trial


class EarlyTrial:
    """Trial of a run without GPUs on a cluster of its own: it runs on the same cores."""

    def __init__(self, prepared: Prepared) -> None:
        self._found: Future[Trial] = Future()
        self._patience = 2 * prepared.config.train.timeout_seconds
        # A daemon: a driver that ends does not wait for it.
        threading.Thread(target=self._run, args=(prepared,), daemon=True, name="trial").start()

    @classmethod
    def begin(cls, prepared: Prepared) -> EarlyTrial | None:
        """Begin the trial of a run on this machine's CPUs; None where it needs the cluster.

        With `encoder.actors: auto` it does, since rates are measured then, on quiet cores.
        """
        config = prepared.config
        gpus = config.train.gpus or config.encoder.gpus
        if gpus or is_auto(config) or os.environ.get("RAY_ADDRESS") or ray.is_initialized():
            return None
        return cls(prepared)

    def result(self) -> Trial:
        """Wait for its end. Raises as `omni.run.trial.try_pipe`."""
        try:
            return self._found.result(timeout=self._patience)
        except FutureTimeoutError:
            raise RuntimeError(
                f"the first block took over {self._patience:.0f} s from loading to training"
            ) from None

    def _run(self, prepared: Prepared) -> None:
        try:
            from omni.run.trial import try_here

            self._found.set_result(try_here(prepared))
        except BaseException as error:
            self._found.set_exception(error)
