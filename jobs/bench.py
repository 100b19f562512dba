"""Measure this machine: encode, train-step, stream, peer, scale, corpus or cache.

A suite reports ratios of things that took turns in one run, beside the machine's own ceiling.
docs/benchmarks.md explains the suites and has figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jobs.cli import parse_settings, run_job, settings_parser

SUITES = ("encode", "train-step", "stream", "peer", "scale", "corpus", "cache")


def main(argv: list[str] | None = None) -> int:
    parser = settings_parser("bench", __doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON here")
    parser.add_argument(
        "--sizes", metavar="N", type=int, nargs="+", help="rows of `corpus`, or keys of `cache`"
    )
    parser.set_defaults(config="scratch")

    def job() -> None:
        arguments, config = parse_settings(parser, argv)
        from omni.bench import run_suite, show

        result = run_suite(arguments.suite, config, arguments.sizes)
        show(result)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result.to_dict(), indent=1) + "\n")

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
