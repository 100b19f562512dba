"""Check that a run trained every utterance of every epoch exactly once."""

from __future__ import annotations

import sys

from jobs.cli import job_parser, run_job
from omni.storage.path import StoragePath, as_path


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("audit", __doc__)
    parser.add_argument("run", type=as_path, metavar="RUN", help="run directory: runs/NAME")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _audit(arguments.run))


def _audit(run_dir: StoragePath) -> None:
    from omni.run.audit import audit

    found = audit(run_dir)
    print(
        f"{run_dir}: {found.steps:,} steps, {found.bins:,} bins, {found.utterances:,} utterances "
        f"trained, {found.epochs:.2f} epochs, in {found.attempts} attempts"
    )
    if found.redone:
        print(f"  {found.redone} steps were repeated after failures; they count once")
    if found.later:
        print(f"  {found.later} steps after the newest checkpoint would be repeated")
    if found.rejected:
        print(f"  {found.rejected} rejected utterances were left out; rejects.jsonl names them")
    if len(found.plans) > 1:
        print(f"  {len(found.plans)} plans, one after another (run.override_fingerprint)")
    for step, reason in sorted(found.skipped.items()):
        print(f"  step {step} made no update: {reason}")
    for problem in found.problems:
        print(f"  {problem}")
    if found.problems:
        raise RuntimeError(f"{len(found.problems)} findings: not exactly once")
    print("clean: every bin of the plan once, every utterance as the plan has it")


if __name__ == "__main__":
    sys.exit(main())
