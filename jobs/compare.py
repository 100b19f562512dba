"""Compare runs: settings, figures, curves and transcripts that differ.

It prints a summary and writes a page with curves, marked words and audio. Runs may be unfinished,
on disk or in a bucket.
"""

from __future__ import annotations

import argparse
import sys

from jobs.cli import job_parser, location, run_job


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("compare", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=location, metavar="RUN", help="run directories: runs/A runs/B")
    add("--out", type=location, default="compare.html", metavar="FILE", help="page to write")
    add("--utterances", type=_number, default=20, help="on the page that differ (default 20)")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _compare(arguments))


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from omni.report.compare_page import write_comparison
    from omni.report.compare_table import print_comparison
    from omni.report.comparison import compare_runs
    from omni.storage.uri import reason_of

    try:
        found = compare_runs(arguments.runs)
        print_comparison(found, Console(highlight=False, soft_wrap=False), 3)
        write_comparison(found, arguments.out, arguments.utterances)
    except OSError as error:  # The storage failed; the input may still be right.
        raise RuntimeError(f"{error.filename or 'storage'}: {reason_of(error)}") from error
    print(f"page: {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
