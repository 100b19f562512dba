"""Prove from a run's own books that every utterance of every epoch was trained exactly once."""

from __future__ import annotations

import argparse
import sys

from jobs.cli import run
from omni.storage.path import StoragePath, as_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.audit", description=__doc__)
    parser.add_argument("run", type=as_path, metavar="RUN", help="runs/NAME")
    arguments = parser.parse_args(argv)
    return run(lambda: _audit(arguments.run))


def _audit(run_dir: StoragePath) -> None:
    from omni.run.audit import audit

    found = audit(run_dir)
    print(
        f"{run_dir}: {found.steps:,} steps, {found.bins:,} bins, {found.utterances:,} utterances "
        f"trained, {found.epochs:.2f} epochs, in {found.attempts} attempts"
    )
    if found.redone:
        print(f"  {found.redone} steps were done again after faults; they count once")
    if found.later:
        print(f"  {found.later} steps after the newest checkpoint would be done again")
    if found.rejected:
        print(f"  {found.rejected} times an utterance was left out, as rejects.jsonl says")
    if len(found.plans) > 1:
        print(f"  {len(found.plans)} plans, one after another (run.override_fingerprint)")
    for step, reason in sorted(found.skipped.items()):
        print(f"  step {step} made no update: {reason}")
    for problem in found.problems:
        print(f"  {problem}")
    if found.problems:
        raise RuntimeError(f"{len(found.problems)} findings: not exactly once")
    print("clean: every bin of the plan once, every utterance where the plan says")


if __name__ == "__main__":
    sys.exit(main())
