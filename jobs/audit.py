"""Check that a run trained every utterance of every epoch exactly once."""

from __future__ import annotations

import sys

from jobs.cli import (
    job_parser,
    location,
    run_job,
    say,
)
from omni.errors import counted
from omni.storage.path import StoragePath


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("audit", __doc__)
    parser.add_argument("run", type=location, metavar="RUN", help="run directory: runs/NAME")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _audit(arguments.run))


def _audit(run_dir: StoragePath) -> None:
    from omni.run.audit import audit

    found = audit(run_dir)
    print(
        f"{run_dir}: {counted(found.steps, 'step')}, {counted(found.bins, 'bin')}, "
        f"{counted(found.utterances, 'utterance')} trained, {found.epochs:.2f} epochs, in "
        f"{counted(found.attempts, 'attempt')}"
    )
    if found.redone:
        print(f"  repeated after failures, and counted once: {counted(found.redone, 'step')}")
    if found.later:
        print(f"  to repeat, after the newest checkpoint: {counted(found.later, 'step')}")
    if found.fenced:
        rows = counted(found.fenced, "ledger row")
        print(f"  written after another driver had taken over, and not counted: {rows}")
    if found.rejected:
        rejected = counted(found.rejected, "utterance")
        print(f"  rejected and left out: {rejected}; rejects.jsonl names them")
    if len(found.plans) > 1:
        print(f"  {len(found.plans)} plans, one after another (run.override_fingerprint)")
    for step, reason in sorted(found.skipped.items()):
        say(f"  step {step} made no update: {reason}")
    for problem in found.problems:
        say(f"  {problem}")
    if found.problems:
        raise RuntimeError(f"{counted(len(found.problems), 'finding')}: not exactly once")
    print("clean: every bin of the plan once, every utterance as the plan has it")


if __name__ == "__main__":
    sys.exit(main())
