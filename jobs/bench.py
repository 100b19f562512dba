"""Measure: encode, train-step, stream, peer, scale or corpus, as ratios on this machine.

Things that are compared took turns in one run, beside the machine's own ceiling.
docs/benchmarks.md explains the suites and has figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import run
from omni.config import load_config

SUITES = ("encode", "train-step", "stream", "peer", "scale", "corpus")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every setting can be given as --section.field VALUE, e.g. --encoder.threads 2.",
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--config", metavar="FILE", default="configs/smoke.yaml")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the figures as JSON")
    known, overrides = parser.parse_known_args(argv)

    def job() -> None:
        config = load_config(known.config, overrides)
        from omni.bench import run_suite, show

        result = run_suite(known.suite, config)
        show(result)
        if known.out is not None:
            known.out.parent.mkdir(parents=True, exist_ok=True)
            known.out.write_text(json.dumps(result.to_dict(), indent=1) + "\n")

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
