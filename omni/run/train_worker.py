"""Function that each Ray Train worker runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.train

from omni.metrics.run_files import write_text
from omni.storage.lease import follow_lease, heartbeat_interval
from omni.stream.streams import STREAM

if TYPE_CHECKING:
    from omni.train.worker_spec import WorkerSpec

FATAL_FAILURE_FILE = "failure.txt"
"""Reason why the run must not be retried, written by rank 0."""


def run_worker(arguments: dict[str, Any]) -> None:
    """Run the training loop of one Ray Train worker.

    arguments: a reference to its spec, and `optim.bins_per_block`, without which the stream cannot
    begin.
    """
    blocks = _blocks(arguments["bins_per_block"])
    # Ray Train's controller imports this module, and needs neither torch nor the model.
    import torch

    from omni.metrics.prometheus import RayPublisher
    from omni.model.download import HubError, SourceError
    from omni.model.precision import limit_gpu_memory
    from omni.train.loop import TrainLoop
    from omni.train.reject_log import TooManyRejects

    spec: WorkerSpec = ray.get(arguments["spec"][0])
    if spec.lease is not None:
        interval = heartbeat_interval(spec.config.run.lease_seconds)
        follow_lease(spec.config.run_dir, spec.lease, interval)
    torch.set_num_threads(spec.config.train.threads)
    context = ray.train.get_context()
    rank, node = context.get_world_rank(), ray.get_runtime_context().get_node_id()
    device = torch.device("cpu")
    if spec.config.train.gpus:
        device = torch.device("cuda", torch.cuda.current_device())  # `join_group` has set it.
    limit_gpu_memory(spec.config.train.gpu_memory)
    failure_file = spec.config.run_dir / FATAL_FAILURE_FILE
    try:
        publisher = RayPublisher(spec.config.run.name, rank)
        TrainLoop(spec, blocks, rank, context.get_world_size(), device, node, publisher).run()
    except (TooManyRejects, FloatingPointError) as error:
        # Every rank fails alike and would fail again: tell the driver not to retry.
        if rank == 0:
            write_text(failure_file, str(error))
    except SourceError as error:
        # A refused language model stays refused, while a hub that is down may come back.
        if rank == 0 and not isinstance(error, HubError):
            write_text(failure_file, str(error))
        raise


def _blocks(rows: int) -> Iterator[pa.Table]:
    """Iterate over this rank's share of the stream, which begins at once, and not when it is read.

    Its processes start while this one builds the model.
    """
    first: Future[Iterator[pa.Table]] = Future()
    shard = ray.train.get_dataset_shard(STREAM)

    def start() -> None:
        try:
            batches = iter(
                shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)
            )
            first.set_result(itertools.chain([next(batches)], batches))
        except StopIteration:
            first.set_result(iter(()))
        except BaseException as error:
            first.set_exception(error)

    # A daemon: a rank that fails before it reads must not wait for the stream.
    threading.Thread(target=start, daemon=True, name="stream").start()

    def blocks() -> Iterator[pa.Table]:
        yield from first.result()

    return blocks()
