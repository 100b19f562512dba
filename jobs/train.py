"""Train a speech language model, or continue an interrupted run."""

from __future__ import annotations

import sys

from jobs.cli import parse_settings, run_job, settings_parser


def main(argv: list[str] | None = None) -> int:
    parser = settings_parser("train", __doc__)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check plan, data and cluster, estimate the time, and stop there",
    )

    def job() -> None:
        arguments, config = parse_settings(parser, argv)
        from omni.run.run import dry_run, train

        if arguments.dry_run:
            dry_run(config)
        else:
            train(config)

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
