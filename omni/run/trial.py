"""Run a few blocks through load, encode and train on the cluster before a run starts.

`omni.run.estimate` and `encoder.actors: auto` use the rates that it measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pyarrow as pa
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from omni.cluster.capacity import selectors
from omni.errors import ConfigError, first_line
from omni.model.download import HubError, SourceError
from omni.model.precision import limit_gpu_memory
from omni.model.speech_lm import OmniModel
from omni.plan.plan import Split
from omni.run.prepare import Prepared, make_worker_spec
from omni.run.rates import (
    Cost,
    Trainer,
    audio_seconds,
    encoder_rate,
    loaded_blocks,
    without_cache,
)
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import StreamSettings, stream_settings
from omni.train.worker_spec import WorkerSpec


@dataclass(frozen=True)
class Trial:
    """Rates in audio seconds per second, of one loading task and of one encoder actor.

    block: seconds of a block on one worker; None if the model does not fit a single worker.
    """

    decode_rate: float
    encoder_rate: float
    block: Cost | None


def try_pipe(
    prepared: Prepared,
    seconds: float = 0.0,
    blocks: int = 2,
    before_training: Callable[[pa.Table], None] = lambda block: None,
) -> Trial:
    """Load, encode and train the plan's first `blocks` blocks, for at least `seconds` per stage.

    before_training: called with the first encoded block. Keeps nothing. Raises ConfigError if a
    block exceeds the memory of a stage or the language model is refused, and RuntimeError if a
    stage fails.
    """
    prepared, bins, settings = _of_blocks(prepared, blocks)
    encoder, train = prepared.config.encoder, prepared.config.train
    split = ray.put(prepared.splits["train"])
    patience = train.timeout_seconds
    for_worker, for_encoder, _ = selectors(prepared.config)
    task: Any = ray.remote(_load_and_encode_there).options(
        num_cpus=encoder.cpus, num_gpus=encoder.gpus, label_selector=for_encoder, max_retries=1
    )
    found = _get(task.remote([split], bins, settings, seconds), patience, "encoder")
    decode_rate, rate, encoded = found
    before_training(encoded[0])
    task = ray.remote(_train).options(
        num_cpus=train.cpus, num_gpus=train.gpus, label_selector=for_worker, max_retries=1
    )
    try:
        cost = _get(task.remote(make_worker_spec(prepared), encoded, seconds), patience, "trainer")
    except _NoRoom:
        if train.strategy == "ddp" or train.most == 1:
            raise
        cost = None  # A worker of the run holds a shard only.
    return Trial(decode_rate, rate, cost)


def try_here(prepared: Prepared, blocks: int = 2) -> Trial:
    """Load, encode and train the plan's first blocks in this process. Raises as `try_pipe`."""
    threads = torch.get_num_threads()
    try:
        return _try_here(prepared, blocks)
    finally:
        torch.set_num_threads(threads)


def _try_here(prepared: Prepared, blocks: int) -> Trial:
    prepared, bins, settings = _of_blocks(prepared, blocks)
    who = "encoder"
    try:
        decode_rate, rate, encoded = _load_and_encode(
            prepared.splits["train"], bins, settings, seconds=0.0
        )
        who = "trainer"
        cost = _train(make_worker_spec(prepared), encoded, seconds=0.0)
    except ConfigError:
        raise
    except Exception as error:
        raise _refusal(error, who) from error
    return Trial(decode_rate, rate, cost)


def _of_blocks(prepared: Prepared, blocks: int) -> tuple[Prepared, list[int], StreamSettings]:
    """Return a run of one block per step, the bins of so many blocks, and settings for them."""
    config = prepared.config
    per_block = config.optim.bins_per_block
    alone = config.optim.model_copy(update={"bins_per_step": per_block})
    prepared = replace(prepared, config=config.model_copy(update={"optim": alone}))
    count = min(blocks, -(-prepared.splits["train"].plan.bins // per_block)) * per_block
    settings = without_cache(stream_settings(prepared.config, prepared.encoder))
    return prepared, list(range(count)), settings


class _NoRoom(ConfigError):
    pass


def _get(result: Any, patience: float, who: str) -> Any:
    """Return the result of a task; turn its failure into ConfigError or RuntimeError."""
    try:
        return ray.get(result, timeout=patience)
    except GetTimeoutError:
        raise RuntimeError(f"the {who} took over {patience:.0f} s for its first block") from None
    except RayTaskError as error:
        raise _refusal(error.cause, who) from error
    except RayError as error:
        raise RuntimeError(f"the {who} died over its first block: {first_line(error)}") from error


def _refusal(cause: Exception, who: str) -> Exception:
    """Turn the failure of a first block into a ConfigError, or a RuntimeError."""
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
        return _NoRoom(
            f"optim.bins_per_block: a block does not fit into the {who}'s memory "
            f"({first_line(cause)}); expected fewer or shorter bins (optim.bin_positions), or "
            "train.recompute"
        )
    if isinstance(cause, SourceError) and not isinstance(cause, HubError):
        return ConfigError(f"{first_line(cause)}")
    reason = f"{type(cause).__name__}: {first_line(cause)}"
    return RuntimeError(f"the {who}'s first block failed: {reason}")


def _load_and_encode_there(
    splits: list[ray.ObjectRef[Split]], bins: list[int], settings: StreamSettings, seconds: float
) -> tuple[float, float, list[pa.Table]]:
    # In a list: Ray would resolve a reference that is an argument itself.
    return _load_and_encode(ray.get(splits[0]), bins, settings, seconds)


def _load_and_encode(
    split: Split, bins: list[int], settings: StreamSettings, seconds: float
) -> tuple[float, float, list[pa.Table]]:
    """Return rates of loading and encoding in audio seconds per second, and encoded blocks."""
    torch.set_num_threads(settings.config.encoder.threads)
    loaded, took = loaded_blocks(split, bins, settings)
    audio = sum(map(audio_seconds, loaded))
    rate, encoded = encoder_rate(EncodeStage(settings), loaded, seconds)
    return audio / took, rate, encoded


def _train(job: WorkerSpec, blocks: list[pa.Table], seconds: float) -> Cost | None:
    """Measure the seconds of a block on a worker that never waits for data.

    None for a sharded model that the memory of this node does not hold whole.
    """
    train = job.config.train
    if train.strategy == "fsdp" and train.most > 1:
        available = psutil.virtual_memory().available
        if whole_bytes(job) > available:
            return None
    torch.set_num_threads(job.config.train.threads)
    device = torch.device("cuda" if job.config.train.gpus else "cpu")
    limit_gpu_memory(job.config.train.gpu_memory)
    return Trainer(job, blocks, device).cost(seconds)


def whole_bytes(job: WorkerSpec) -> int:
    """Return the bytes of the host that one worker takes for the whole model in fp32.

    On a CPU also those of gradients and of AdamW's state.
    """
    with torch.device("meta"):
        model = OmniModel(job.model)
    model.train_parts(job.config.model.train)
    trained = 0 if job.config.train.gpus else 12
    return sum(p.numel() * (4 + trained * p.requires_grad) for p in model.parameters())
