"""Compare the ledger of a run with its plan: was every utterance trained exactly once?

Reads the run directory only: `plan/` to make the plan again, the ledger for the utterances of each
step, events.jsonl for the plan of each attempt, and the newest checkpoint for the steps that count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from omni.checkpoint.resume import newest_checkpoint
from omni.metrics.run_files import read_events, read_json_lines
from omni.plan.plan_file import plan_path, read_plan_file
from omni.plan.windows_file import read_window_bins, read_windows_file, windows_path
from omni.run.audited_plan import AuditedPlan, PlanOfWindows, WholePlan
from omni.storage.path import StoragePath

_SHOWN = 10  # steps or ids listed in a message


class AuditError(RuntimeError):
    """The run directory lacks a file that an audit needs; the message names it."""


@dataclass
class Audit:
    """Findings of an audit. `problems` is empty if every utterance was trained exactly once."""

    steps: int = 0
    """Step of the newest checkpoint."""
    bins: int = 0
    utterances: int = 0
    """Utterances trained, once for each time."""
    epochs: float = 0.0
    attempts: int = 0
    redone: int = 0
    """Steps repeated after faults."""
    later: int = 0
    """Steps in the ledger after the newest checkpoint."""
    fenced: int = 0
    """Rows of the ledger that an attempt wrote after another had taken over; they count nowhere."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Reasons of steps without an update."""
    rejected: int = 0
    """Times that an utterance was left out of its bin."""
    plans: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def audit(run_dir: StoragePath) -> Audit:
    """Audit a run directory. Raises AuditError if files are missing or damaged."""
    newest = newest_checkpoint(run_dir / "checkpoints")
    if newest is None:
        raise AuditError(f"{run_dir}: no checkpoint to audit")
    state = newest.state
    found = Audit(steps=state.step)
    events = read_events(run_dir)
    # In the order of their leases: the clocks of two drivers may differ.
    attempts = sorted((row for row in events if row["event"] == "attempt"), key=_lease)
    found.attempts = len(attempts)
    found.redone = sum(int(row.get("redone") or 0) for row in attempts)
    ledger = _without_fenced(_ledger(run_dir, found), attempts, found)
    rejected = {r["id"] for r in read_json_lines(run_dir / "rejects.jsonl") if "step" in r}
    trained: Counter[int] = Counter()
    for first, last, fingerprint in _segments(attempts, state.step):
        plan = _plan(run_dir, fingerprint, last)
        if plan.fingerprint != fingerprint:
            found.problems.append(f"plan/{fingerprint} makes plan {plan.fingerprint}")
            continue
        found.plans.append(fingerprint)
        try:
            for step in range(first + 1, last + 1):
                took = _check_step(step, plan, ledger.get(step, []), rejected, found)
                found.utterances += len(took)
                if plan.counts_all:
                    trained.update(took)
            found.problems += plan.problems()
            found.epochs = plan.epoch()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise AuditError(
                f"plan/{fingerprint}: the prepared corpus cannot be read: {error}"
            ) from None
        if last == state.step and state.bins_consumed != last * plan.bins_per_step:
            found.problems.append(
                f"the checkpoint of step {last} says {state.bins_consumed} bins, "
                f"the plan {last * plan.bins_per_step}"
            )
    if len(found.plans) == 1 and not found.problems:
        _check_counts(trained, found)
    found.later = sum(step > state.step for step in ledger)
    _check_metrics(run_dir, state.step, attempts, found)
    return found


def _lease(row: dict[str, Any]) -> int:
    """Return the lease that a row was written under; 0 for rows of older versions."""
    return int(row.get("lease") or 0)


def _valid_lease(attempts: Sequence[dict[str, Any]], step: int) -> int:
    """Return the smallest lease whose rows of a step count: that of the last attempt to reach it.

    Rows before the step at which an attempt began are of the attempts before it.
    """
    return max((_lease(row) for row in attempts if int(row["step"]) < step), default=0)


def _without_fenced(
    ledger: dict[int, list[dict[str, Any]]], attempts: Sequence[dict[str, Any]], found: Audit
) -> dict[int, list[dict[str, Any]]]:
    """Leave out rows that a process wrote after it had lost the run, and count them."""
    kept: dict[int, list[dict[str, Any]]] = {}
    for step, rows in ledger.items():
        least = _valid_lease(attempts, step)
        valid = [row for row in rows if _lease(row) >= least]
        found.fenced += len(rows) - len(valid)
        if valid:
            kept[step] = valid
    return kept


def _segments(attempts: Sequence[dict[str, Any]], steps: int) -> list[tuple[int, int, str]]:
    """Return (first, last, plan) for steps first+1..last.

    The last attempt to reach a step counts. Raises AuditError without any attempt.
    """
    if not attempts:
        raise AuditError("events.jsonl: no attempt is recorded")
    segments: list[tuple[int, int, str]] = []
    for row in attempts:
        start = int(row["step"])
        segments = [(a, min(b, start), plan) for a, b, plan in segments if a < start]
        segments.append((start, steps, str(row["plan"])))
    joined: list[tuple[int, int, str]] = []
    for first, last, plan in segments:
        if joined and joined[-1][2] == plan:
            joined[-1] = (joined[-1][0], last, plan)
        elif first < last:
            joined.append((first, last, plan))
    return [part for part in joined if part[0] < part[1]]


def _plan(run_dir: StoragePath, fingerprint: str, steps: int) -> AuditedPlan:
    """Make the first steps of a plan again. Raises AuditError."""
    path = plan_path(run_dir, fingerprint)
    windows = windows_path(run_dir, fingerprint)
    try:
        if windows.is_file():
            path = windows
            known = read_window_bins(run_dir, fingerprint)
            return PlanOfWindows(read_windows_file(path), steps, known)
        return WholePlan(read_plan_file(path), steps)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise AuditError(f"{path}: missing or damaged ({error})") from None


def _ledger(run_dir: StoragePath, found: Audit) -> dict[int, list[dict[str, Any]]]:
    """Read the rows of all ranks, by step; damaged rows become problems."""
    steps: dict[int, list[dict[str, Any]]] = defaultdict(list)
    paths: list[StoragePath] = [*(run_dir / "ledger").glob("rank-*.jsonl")]
    for path in sorted(paths, key=str):
        before = 0
        for row in read_json_lines(path):
            try:
                step, _, _ = int(row["step"]), int(row["bin"]), list(row["utterances"])
            except (KeyError, TypeError, ValueError):
                found.problems.append(f"{path.name}: {str(row)[:80]} is not a ledger row")
                continue
            if step < before:
                found.problems.append(f"{path.name}: step {step} comes after step {before}")
            before = step
            steps[step].append(row)
    return steps


def _check_step(
    step: int,
    plan: AuditedPlan,
    rows: Sequence[dict[str, Any]],
    rejected: set[str],
    found: Audit,
) -> list[int]:
    """Return the utterances that a step trained; differences from the plan become problems."""
    first = (step - 1) * plan.bins_per_step
    wanted = Counter(range(first, min(first + plan.bins_per_step, plan.bins)))
    given = Counter(row["bin"] for row in rows)
    for numbers, what in (
        (sorted((wanted - given).elements()), "not trained"),
        (sorted((given - wanted).elements()), "trained more than once"),
    ):
        if numbers:
            found.problems.append(f"step {step}: bins {_some(numbers)} {what}")
    trained: list[int] = []
    for row in rows:
        members = Counter(plan.bin(row["bin"]).tolist()) if row["bin"] < plan.bins else Counter()
        took = Counter(row["utterances"])
        absent = [
            name for name in plan.ids(list((members - took).elements())) if name not in rejected
        ]
        if absent:
            lacks = f"lacks {_some(absent)}, not rejected"
            found.problems.append(f"step {step}: bin {row['bin']} {lacks}")
        if extra := sorted((took - members).elements()):
            found.problems.append(f"step {step}: bin {row['bin']} holds utterances {_some(extra)}")
        found.rejected += (members - took).total() - len(absent)
        if "skipped" in row:
            found.skipped[step] = row["skipped"]
        trained += row["utterances"]
    found.bins += given.total()
    return trained


def _check_counts(trained: Counter[int], found: Audit) -> None:
    """Check that no utterance was trained two times more often than another."""
    if trained and not found.rejected:
        least, most = min(trained.values()), max(trained.values())
        if most - least > 1:
            found.problems.append(f"some utterances were trained {least} times, others {most}")


def _check_metrics(
    run_dir: StoragePath, steps: int, attempts: Sequence[dict[str, Any]], found: Audit
) -> None:
    logged = Counter(
        row["step"]
        for row in read_json_lines(run_dir / "metrics.jsonl")
        if row.get("kind") == "train"
        and isinstance(row.get("step"), int)
        and _lease(row) >= _valid_lease(attempts, row["step"])
    )
    if twice := sorted(step for step, count in logged.items() if count > 1 and step <= steps):
        found.problems.append(f"metrics.jsonl: steps {_some(twice)} are logged twice")


def _some(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:_SHOWN]))
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
