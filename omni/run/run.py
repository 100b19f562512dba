"""Run a whole training on a Ray cluster: prepare, check, train, report."""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from dataclasses import asdict
from typing import Any

from omni.checkpoint.resume import newest_step
from omni.checkpoint.train_state import TrainState
from omni.cluster.ray_init import start_ray
from omni.config import Config
from omni.errors import ConfigError, ExitCode, counted
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
from omni.run.console import LiveView
from omni.run.early_trial import EarlyTrial
from omni.run.fingerprints import check_fingerprints
from omni.run.history import (
    STARTED,
    TAKEOVER,
    changed_settings,
    describe_change,
    earlier_wall_seconds,
)
from omni.run.prepare import Prepared, prepare
from omni.run.signals import Signals
from omni.storage.lease import LEASE_FILE, Lease
from omni.storage.owner import this_process
from omni.storage.path import ObjectPath, remove_tree
from omni.storage.uri import reason_of
from omni.stream.compaction import compact_if_many
from omni.stream.stream_settings import stream_settings

_WORKING_DIR_COPIES = "working_dir_files"
"""Folder in which Ray unpacks the working directories of jobs."""


def train(config: Config) -> dict[str, Any]:
    """Start or continue the run that `config` describes; return its summary.

    Raises ConfigError before Ray starts for wrong input, LeaseError if another driver trains the
    run, TrainingError if the run fails for good, and, after writing a checkpoint, SystemExit(143)
    on SIGTERM and KeyboardInterrupt on Ctrl-C.
    """
    began = time.monotonic()
    view = LiveView()
    check_trackers(config)
    _check_storage(config)
    prepared, lease = _prepare_alone(config, view)
    try:
        return _train(prepared, lease, view, began)
    finally:
        lease.release()


def _prepare_alone(config: Config, view: LiveView) -> tuple[Prepared, Lease]:
    """Take the lease of the run, and prepare it as it is from then on.

    A run that is new gets its folder, and its lease, once the config has been found to be right.
    """
    new = not config.run_dir.exists()
    prepared = prepare(config, view.show) if new else None
    if new:
        _make_folder(config)
    try:
        lease = Lease.take(config.run_dir, config.run.lease_seconds, view.show)
    except OSError as error:
        reason = f"{LEASE_FILE} cannot be written: {reason_of(error)}"
        raise ConfigError(f"run.storage: {config.run_dir} {reason}") from None
    try:
        # Another driver may have trained meanwhile.
        return prepared if prepared and lease.number == 1 else prepare(config, view.show), lease
    except BaseException:
        lease.release()
        raise


def _train(prepared: Prepared, lease: Lease, view: LiveView, began: float) -> dict[str, Any]:
    """Train what is left of the run. began: time.monotonic() of this driver's start."""
    config = prepared.config
    state, overridden = _saved_state(prepared)
    step = 0 if state is None else state.step
    changed = {} if state is None else changed_settings(config)
    earlier = 0.0 if state is None else earlier_wall_seconds(config.run_dir, state.seconds)
    _write_run_files(prepared)
    view.header(prepared, state)
    if lease.note is not None:
        view.warn(lease.note)
    _write_takeover(lease, view, config, step)
    for name, change in changed.items():
        view.changed(describe_change(name, change))
        write_event(config.run_dir, "setting", step, name=name, before=change[0], after=change[1])
    if overridden:
        write_event(config.run_dir, "override", step, fields=overridden)
        view.changed(f"{', '.join(overridden)}, as requested (run.override_fingerprint)")
    done = _finished(config, state)
    if done is not None:
        _warn_of_damage(view, prepared)
        view.complete(config.run_dir)
        view.footer(done, write_report(config.run_dir))
        return done
    owner = asdict(this_process())
    write_event(config.run_dir, STARTED, step, wall_seconds=round(earlier, 1), owner=owner)
    early = EarlyTrial.begin(prepared) if state is None else None
    _start_cluster(config)
    from omni.metrics.prometheus import driver_publisher
    from omni.run.attempts import Attempts
    from omni.run.preflight import preflight

    signals = Signals(config.run.grace_seconds)
    # Steps that a killed driver showed and that are redone now are shown once.
    keep_lines(config.run_dir / METRICS, lambda row: row.get("step", 0) <= step)
    with Trackers(config, view.warn) as trackers:
        with Follower(config.run_dir, [view, trackers.tensorboard], view.warn):
            prepared = preflight(prepared, view.show, trial=state is None, early=early)
            with signals, driver_publisher(config.run.name) as publisher:
                finished = Attempts(prepared, signals, lease, publisher).run()
        if not finished:
            _exit_stopped(view, config, signals)
        _compact_cache(view, prepared)
        summary = _complete_summary(prepared, earlier + time.monotonic() - began)
        view.footer(summary, write_report(config.run_dir))
        trackers.complete(summary)
    return summary


def _write_takeover(lease: Lease, view: LiveView, config: Config, step: int) -> None:
    """Report that the driver before this one did not end by itself."""
    before = lease.previous
    if before is None or before.released:
        return
    owner = asdict(before.owner)
    write_event(
        config.run_dir, TAKEOVER, step, reason=f"from {before}", owner=owner, taken=before.number
    )
    view.show(f"  taking over from {before}")


def dry_run(config: Config) -> None:
    """Do everything up to the first step, and leave no files. Raises as `train` does."""
    check_trackers(config)
    _check_storage(config)
    view = LiveView()
    prepared = prepare(config, view.show)
    state, _ = _saved_state(prepared)
    existed = config.run_dir.exists()
    _make_folder(config)
    view.header(prepared, state)
    _warn_of_damage(view, prepared)
    _start_cluster(config)
    from omni.run.preflight import preflight

    try:
        preflight(prepared, view.show, trial=True, dry=True)
    finally:
        if not existed:
            remove_tree(config.run_dir)
    view.show("  dry run: nothing was trained")


def _start_cluster(config: Config) -> None:
    """Start Ray or connect to it, with everything imported that uses it."""
    modules = threading.Thread(target=_import_users_of_ray)
    modules.start()
    if os.environ.get("RAY_ADDRESS"):
        # Ray may unpack the working directory of a job, in which omni is, again when it connects.
        modules.join()
    # A local cluster gets CPUs for as many actors as may be chosen.
    start_ray(assume_actors(config, os.cpu_count() or 1))
    modules.join()


def _import_users_of_ray() -> None:
    for name in ("omni.run.preflight", "omni.run.attempts"):
        importlib.import_module(name)


def _warn_of_damage(view: LiveView, prepared: Prepared) -> None:
    """Name damaged checkpoints where no attempt follows that reports them as events."""
    for reason in prepared.damaged:
        view.warn(f"skipping damaged checkpoint {reason}")


def _compact_cache(view: LiveView, prepared: Prepared) -> None:
    """Join the files of a feature cache that has many."""
    location = stream_settings(prepared.config, prepared.encoder).cache
    if location is None:
        return
    try:
        compacted = compact_if_many(location)
    except OSError as error:
        view.warn(f"the feature cache was not compacted: {reason_of(error)}")
        return
    if compacted is not None:
        view.show(f"  feature cache compacted: {compacted}")


def _check_storage(config: Config) -> None:
    """Raise ConfigError for an unreachable bucket, or a folder that Ray will delete."""
    if isinstance(config.run_dir, ObjectPath):
        try:
            config.run_dir.exists()
        except OSError as error:
            reason = f"cannot be read: {reason_of(error)}"
            raise ConfigError(f"run.storage: {config.run_dir} {reason}") from None
    elif _WORKING_DIR_COPIES in config.run_dir.parts:
        raise ConfigError(
            f"run.storage: {config.run.storage} is in Ray's copy of the working directory, which "
            "is deleted with the job; expected an absolute path that every node sees"
        )


def _make_folder(config: Config) -> None:
    """Create the run directory. Raises ConfigError if it cannot be written."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        probe = config.run_dir / ".preflight"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written: {reason_of(error)}"
        raise ConfigError(f"run.storage: {config.run_dir} {reason}") from None


def _write_run_files(prepared: Prepared) -> None:
    """Write config, tokenizer, plan and index rejects into the run directory.

    Raises ConfigError if it cannot be written.
    """
    config = prepared.config
    _make_folder(config)
    write_text(config.run_dir / "config.yaml", config.to_yaml())
    write_text(config.run_dir / "tokenizer.json", prepared.tokenizer.to_json())
    prepared.write_plan_file()
    _write_index_rejects(prepared)


def _exit_stopped(view: LiveView, config: Config, signals: Signals) -> None:
    """End the process of a run that was stopped by a signal."""
    step = newest_step(config.run_dir / "checkpoints")
    reached = max(
        (row.get("step", 0) for row in read_json_lines(config.run_dir / METRICS)), default=0
    )
    saved = f"the checkpoint of step {step} is saved" if step else "there is no checkpoint"
    lost = f"; {counted(reached - step, 'step')} will be trained again" if reached > step else ""
    again = "continues the run" if step else "starts the run again"
    text = f"{signals.received}: stopped unfinished; {saved}{lost}; the same command {again}"
    write_report(config.run_dir)
    if signals.interrupted:
        raise KeyboardInterrupt(text)
    view.show(text)
    raise SystemExit(ExitCode.TERMINATED)


def _finished(config: Config, state: TrainState | None) -> dict[str, Any] | None:
    """Return the summary of a run that is complete; another attempt would overwrite it."""
    path = config.run_dir / "summary.json"
    if state is None or state.step < config.optim.steps or not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary if summary.get("steps") == state.step else None


def _saved_state(prepared: Prepared) -> tuple[TrainState | None, list[str]]:
    """Return the state to resume from and the fingerprints that may differ from the run's."""
    if prepared.resume is None:
        return None, []
    state = prepared.resume.state
    return state, check_fingerprints(prepared, state.fingerprints)


def _write_index_rejects(prepared: Prepared) -> None:
    """Put the rows that the index rejected at the head of rejects.jsonl."""
    path = prepared.config.run_dir / "rejects.jsonl"
    streamed = [row for row in read_json_lines(path) if "step" in row]
    remove_lines(path)
    append_json(path, [reject.to_dict() for reject in prepared.rejects] + streamed)
    if not path.exists():
        path.touch()


def _complete_summary(prepared: Prepared, wall_seconds: float) -> dict[str, Any]:
    """Add the figures that only the driver knows to summary.json."""
    path = prepared.config.run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text())
    counts = dict(summary["rejects"])
    for reject in prepared.rejects:
        counts[reject.reason] = counts.get(reject.reason, 0) + 1
    summary |= {
        "rejects": counts,
        "wall_seconds": round(wall_seconds, 1),
        "train_hours": prepared.splits["train"].hours,
    }
    write_json(path, summary)
    return summary
