"""A whole run on a Ray cluster: prepare, stream, train, report."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pyarrow.compute as pc

from omni.audio.logmel import SAMPLES_PER_HOUR
from omni.checkpoint.resume import newest_step
from omni.checkpoint.train_state import TrainState
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.errors import ConfigError
from omni.metrics.follower import METRICS, Follower
from omni.metrics.run_files import (
    append_json,
    keep_lines,
    read_json_lines,
    remove_lines,
    write_event,
    write_json,
    write_text,
)
from omni.metrics.tracker_process import Trackers
from omni.metrics.trackers import check_trackers
from omni.report.run_page import write_report
from omni.run.actor_count import assume_actors
from omni.run.attempts import Attempts
from omni.run.console import LiveView
from omni.run.preflight import preflight
from omni.run.prepare import Prepared, check_fingerprints, prepare
from omni.run.signals import Signals
from omni.storage.path import ObjectPath, reason_of, remove_tree

_COPIES = "working_dir_files"  # where Ray unpacks the folders of jobs


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) the training that `config` describes; returns the summary.

    Raises ConfigError before Ray starts when the input is wrong, TrainingError when a run fails
    for good. After SIGTERM, and a checkpoint, SystemExit(0); after Ctrl-C KeyboardInterrupt.
    """
    began = time.monotonic()
    view = LiveView()
    check_trackers(config)
    _check_place(config)
    prepared = prepare(config)
    state, overridden = _saved_state(prepared)
    step = 0 if state is None else state.step
    _claim(prepared)
    view.header(prepared, state)
    if overridden:
        write_event(config.run_dir, "override", step, fields=overridden)
        view.say(f"  [yellow]going on with another {', '.join(overridden)}[/], as asked")
    done = _finished(config, state)
    if done is not None:
        _warn_of_damage(view, prepared)
        view.complete(config.run_dir)
        view.footer(done, write_report(config.run_dir))
        return done
    # A local cluster gets CPUs for as many actors as may be chosen.
    start_ray(assume_actors(config, os.cpu_count() or 1))
    signals = Signals()
    # What a killed driver saw of steps that are redone is to be shown once.
    keep_lines(config.run_dir / METRICS, lambda row: row.get("step", 0) <= step)
    with Trackers(config, view.warn) as trackers:
        with Follower(config.run_dir, [view, trackers.tensorboard]):
            prepared = preflight(prepared, view.say, trial=state is None)
            with signals:
                finished = Attempts(prepared, signals).run()
        if not finished:
            _say_goodbye(view, config, signals)
        summary = _close(prepared, time.monotonic() - began)
        view.footer(summary, write_report(config.run_dir))
        trackers.complete(summary)
    return summary


def dry_run(config: Config) -> None:
    """Everything up to the first step: what is wrong is said as `train` would say it, and what is
    right is left as it was. Raises as `train` does.
    """
    check_trackers(config)
    _check_place(config)
    prepared = prepare(config)
    state, _ = _saved_state(prepared)
    existed = config.run_dir.exists()
    _make_folder(config)
    view = LiveView()
    view.header(prepared, state)
    _warn_of_damage(view, prepared)
    # A local cluster gets CPUs for as many actors as may be chosen.
    start_ray(assume_actors(config, os.cpu_count() or 1))
    try:
        preflight(prepared, view.say, trial=True)
    finally:
        if not existed:
            remove_tree(config.run_dir)
    view.say("  dry run: nothing was trained")


def _warn_of_damage(view: LiveView, prepared: Prepared) -> None:
    """Name damaged checkpoints where no attempt follows that reports them as events."""
    for reason in prepared.damaged:
        view.warn(f"skipping damaged checkpoint {reason}")


def _check_place(config: Config) -> None:
    """Raises ConfigError for a bucket that does not answer, and for runs in the copy of a submitted
    job's folder: Ray deletes it.
    """
    if isinstance(config.run_dir, ObjectPath):
        try:
            config.run_dir.exists()
        except OSError as error:
            reason = f"cannot be read: {reason_of(error)}"
            raise ConfigError(f"run.storage: {config.run_dir} {reason}") from None
    elif _COPIES in config.run_dir.parts:
        raise ConfigError(
            f"run.storage: {config.run.storage} lies in Ray's own copy of the working directory, "
            "which goes away with the job; expected an absolute path that every node sees"
        )


def _make_folder(config: Config) -> None:
    """Raises ConfigError where the run's directory cannot be written."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        probe = config.run_dir / ".preflight"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written: {reason_of(error)}"
        raise ConfigError(f"run.storage: {config.run_dir} {reason}") from None


def _claim(prepared: Prepared) -> None:
    """Make the run's directory say what it is. Raises ConfigError where it cannot be written."""
    config = prepared.config
    _make_folder(config)
    write_text(config.run_dir / "config.yaml", config.to_yaml())
    write_text(config.run_dir / "tokenizer.json", prepared.tokenizer.to_json())
    prepared.write_plan_file()
    _write_index_rejects(prepared)


def _say_goodbye(view: LiveView, config: Config, signals: Signals) -> None:
    """The end of a run that was asked to stop."""
    step = newest_step(config.run_dir / "checkpoints")
    view.say(
        f"{signals.received}: stopped; the checkpoint of step {step} holds what was done, "
        "and the same command continues"
    )
    write_report(config.run_dir)
    if signals.interrupted:
        raise KeyboardInterrupt
    raise SystemExit(0)


def _finished(config: Config, state: TrainState | None) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; training it again would only blank it."""
    path = config.run_dir / "summary.json"
    if state is None or state.step < config.optim.steps or not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary if summary.get("steps") == state.step else None


def _saved_state(prepared: Prepared) -> tuple[TrainState | None, list[str]]:
    """Where the run stands, and what is knowingly different from before. Raises ConfigError."""
    if prepared.resume is None:
        return None, []
    state = prepared.resume.state
    return state, check_fingerprints(prepared, state.fingerprints)


def _write_index_rejects(prepared: Prepared) -> None:
    """Rows that the index left out lead rejects.jsonl; they are known before the first step."""
    path = prepared.config.run_dir / "rejects.jsonl"
    streamed = [row for row in read_json_lines(path) if "step" in row]
    remove_lines(path)
    append_json(path, [reject.to_dict() for reject in prepared.rejects] + streamed)
    if not path.exists():
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
        "train_hours": pc.sum(prepared.splits["train"].table["samples"]).as_py() / SAMPLES_PER_HOUR,
    }
    write_json(path, summary)
    return summary
