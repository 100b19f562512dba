"""Write a page about a corpus or a run's plan, with figures and utterances to listen to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import job_parser, run_job
from jobs.corpus_arguments import add_corpus_limits, corpus_spec, download_limits


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("inspect", __doc__)
    add = parser.add_argument
    add(
        "target",
        type=corpus_spec,
        metavar="CORPUS|RUN",
        help="corpus (any SPEC of omni index), or runs/NAME",
    )
    add("--out", type=Path, help="page (default: inspect.html in the run directory, or here)")
    add("--utterances", type=_number, default=12, help="number to listen to (default 12)")
    add("--seed", type=_number, default=0, help="seed of their choice (default 0)")
    add("--tokenizer", type=Path, help="tokenizer.json to count tokens with")
    add_corpus_limits(parser)
    arguments = parser.parse_args(argv)
    return run_job(lambda: _inspect(arguments))


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)


def _inspect(arguments: argparse.Namespace) -> None:
    from omni.report.corpus_page import write_page

    path = write_page(
        arguments.target,
        arguments.out,
        utterances=arguments.utterances,
        seed=arguments.seed,
        tokenizer=arguments.tokenizer,
        allow_absolute=arguments.allow_absolute,
        downloads=download_limits(arguments),
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
