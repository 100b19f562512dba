"""Train a speech language model, or continue an interrupted run: the same command does both."""

from __future__ import annotations

import sys

from jobs.cli import parse_config, run

FLAGS = {"dry_run": "check the plan against data and cluster, estimate its time, and stop there"}


def main(argv: list[str] | None = None) -> int:
    def job() -> None:
        config, given = parse_config("train", __doc__ or "", argv, FLAGS)
        # Ray, only once the arguments are right
        from omni.run.run import dry_run, train

        if given.dry_run:
            dry_run(config)
        else:
            train(config)

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
