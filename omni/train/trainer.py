"""A whole run on a Ray cluster: prepare, stream, train, report."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import Dataset, ExecutionOptions, ExecutionResources
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from omni.config import Config
from omni.data.plan import Split
from omni.data.stages import StreamSettings
from omni.data.stream import make_stream
from omni.report import write_report
from omni.train.auto import sized
from omni.train.checkpoint import TrainState, newest_checkpoint, read_state
from omni.train.feed import TooManyRejects
from omni.train.job import Job, encoder_settings, held_bins, make_job
from omni.train.live import LiveView
from omni.train.loop import TrainLoop
from omni.train.metrics import append_json, read_json_lines, write_json, write_text
from omni.train.prepare import Prepared, check_fingerprints, prepare

STREAM = "stream"
FAILURE = "failure.txt"  # why a run stopped for good, written by rank 0


class TrainingError(RuntimeError):
    """Training stopped; the message says why in one line."""


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) the training that `config` describes; returns the summary.

    Raises ConfigError before Ray starts when the input is wrong, TrainingError when a run fails
    for good.
    """
    began = time.monotonic()
    view = LiveView(config.run_dir)
    prepared = prepare(config)
    state = _saved_state(prepared)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_text(config.run_dir / "config.yaml", config.to_yaml())
    prepared.tokenizer.save(config.run_dir / "tokenizer.json")
    _write_index_rejects(prepared)
    view.header(prepared, state)
    done = _finished(config, state)
    if done is not None:
        view.complete(config.run_dir)
        view.footer(done, write_report(config.run_dir))
        return done
    start_ray(config)
    with view.following():
        prepared = sized(prepared)
        _fit(prepared)
    summary = _close(prepared, time.monotonic() - began)
    view.footer(summary, write_report(config.run_dir))
    return summary


def _finished(config: Config, state: TrainState | None) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; training it again would only blank it."""
    path = config.run_dir / "summary.json"
    if state is None or state.step < config.optim.steps or not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary if summary.get("steps") == state.step else None


def start_ray(config: Config) -> None:
    """Connect to the cluster (RAY_ADDRESS, or a running driver), or start a local one.

    A local one gets at least as many logical CPUs as the stages ask for: they are shares of the
    real ones, and a stage that finds none would stand still.
    """
    # Trainer processes print through our own files; Ray's copies would double each line.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    runtime_env = {
        "env_vars": {
            name: os.environ[name]
            for name in ("WHISPER_MS_ID", "WHISPER_HF_ID", "HF_ENDPOINT", "HF_HOME")
            if name in os.environ
        }
    }
    options: dict[str, Any] = {"logging_level": logging.ERROR, "runtime_env": runtime_env}
    if not os.environ.get("RAY_ADDRESS"):
        # A stage is a process more, not a core more: no warning about their number.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        t, e, d = config.train, config.encoder, config.data
        actors = max(1, os.cpu_count() or 1) if e.actors == "auto" else e.actors
        need = t.workers * t.cpus + actors * e.cpus + d.loaders + 1
        options |= {
            "num_cpus": max(os.cpu_count() or 1, int(np.ceil(need))),
            "log_to_driver": False,
            "include_dashboard": False,
        }
    ray.init(**options)


def _saved_state(prepared: Prepared) -> TrainState | None:
    if prepared.resume is None:
        return None
    state = read_state(prepared.resume).state
    check_fingerprints(prepared, state.fingerprints)
    return state


def _fit(prepared: Prepared) -> None:
    """Run Ray Train to the end of the plan, through restarts of the worker group."""
    config = prepared.config
    failure = config.run_dir / FAILURE
    failure.unlink(missing_ok=True)
    options = ExecutionOptions(preserve_order=True)
    if config.data.buffer_mb is not None:
        options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=config.data.buffer_mb << 20
        )
    resources = {"CPU": config.train.cpus}
    if config.train.gpus:
        resources["GPU"] = config.train.gpus
    # The driver owns the index and the plans; the stages read them from the object store. The
    # references travel in lists: Ray would resolve one that is an argument itself.
    splits = [ray.put(split) for split in prepared.splits.values()]
    settings = encoder_settings(config, prepared.encoder)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": make_job(prepared)},
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"attempt-{datetime.now(timezone.utc):%Y%m%dT%H%M%S}",
            storage_path=str(config.run_dir / ".ray"),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
        # Called again whenever the worker group starts: the stream begins where the newest
        # checkpoint says.
        datasets={STREAM: functools.partial(_open_stream, splits, settings)},
        dataset_config=DataConfig(execution_options=options),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise TrainingError(_root_cause(error)) from error
    if failure.is_file():
        raise TrainingError(failure.read_text())


def _open_stream(references: list[ray.ObjectRef], settings: StreamSettings) -> Dataset:
    """Held-out bins once, then the plan from where the newest checkpoint stands."""
    config = settings.config
    path = newest_checkpoint(config.run_dir / "checkpoints")
    first_step = 0 if path is None else read_state(path).state.step
    splits: list[Split] = ray.get(references)
    rows = [(i, held_bins(s, config)) for i, s in enumerate(splits) if s.name != "train"]
    train = next(i for i, s in enumerate(splits) if s.name == "train")
    plan, optim = splits[train].plan, config.optim
    steps = plan.rows(first_step, optim.steps, config.train.workers, optim.bins_per_block)
    rows.append((train, steps))
    return make_stream(references, [part for part in rows if len(part[1])], settings)


def _work(arguments: dict[str, Any]) -> None:
    """The function of one Ray Train worker."""
    job: Job = arguments["job"]
    torch.set_num_threads(job.config.train.threads)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = ray.train.torch.get_device() if job.config.train.gpus else torch.device("cpu")
    blocks = _blocks(job.config.optim.bins_per_block)
    try:
        TrainLoop(job, blocks, rank, context.get_world_size(), device).run()
    except (TooManyRejects, FloatingPointError) as error:
        # Every rank fails alike and would again: leave word for the driver instead of a retry.
        if rank == 0:
            write_text(job.config.run_dir / FAILURE, str(error))


def _blocks(rows: int) -> Iterator[pa.Table]:
    shard = ray.train.get_dataset_shard(STREAM)
    yield from shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)


def _root_cause(error: BaseException) -> str:
    """The first failure of a worker, in one line with its rank."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return f"{type(error).__name__}: {_last_line(error)}"
    rank, cause = sorted(failures.items())[0]
    while (deeper := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = deeper
    return f"rank {rank}: {type(cause).__name__}: {_last_line(cause)}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _write_index_rejects(prepared: Prepared) -> None:
    """Rows that the index left out lead rejects.jsonl; they are known before the first step."""
    path = prepared.config.run_dir / "rejects.jsonl"
    streamed = [row for row in read_json_lines(path) if "step" in row]
    path.unlink(missing_ok=True)
    append_json(path, [reject.to_dict() for reject in prepared.rejects] + streamed)
    path.touch()


def _close(prepared: Prepared, wall_seconds: float) -> dict[str, Any]:
    """Add what only the driver knows to the summary."""
    path = prepared.config.run_dir / "summary.json"
    summary = json.loads(path.read_text())
    counts = dict(summary["rejects"])
    for reject in prepared.rejects:
        counts[reject.reason] = counts.get(reject.reason, 0) + 1
    summary |= {
        "rejects": counts,
        "wall_seconds": round(wall_seconds, 1),
        "train_hours": sum(prepared.splits["train"].table["samples"].to_pylist()) / 57_600_000,
    }
    write_json(path, summary)
    return summary
