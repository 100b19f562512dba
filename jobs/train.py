"""Train a speech language model, or continue an interrupted run: the same command does both."""

from __future__ import annotations

import sys

from jobs.cli import parse_config, run


def main(argv: list[str] | None = None) -> int:
    def job() -> None:
        config = parse_config("train", __doc__ or "", argv)
        from omni.train.trainer import train  # Ray, only once the arguments are right

        train(config)

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
