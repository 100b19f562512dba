"""Make English speech from text with free voices: the data of omni-tiny.

It reads the sentences of WordNet, lets hibari, flite and espeak-ng speak them, and writes shards
that omni index reads in place, with their sources and licences. docs/omni-tiny.md has the recipe.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from jobs.cli import (
    job_parser,
    positive,
    run_job,
    say,
)

_NICENESS = 19  # The job and its processes give way to everything else on the machine.


def main(argv: list[str] | None = None) -> int:
    from omni.recipes.synthesize import WORDNET
    from omni.recipes.takes import MIXTURE

    usual = ",".join(f"{name}={share:g}" for name, share in MIXTURE.items())
    parser = job_parser("synthesize", __doc__)
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the shards")
    add("--hours", metavar="H", type=_hours, required=True, help="at least this much speech")
    add("--seed", metavar="S", type=_seed, default=0, help="order, voices, speeds, levels")
    add("--processes", metavar="N", type=positive, default=1, help="of one core each (default 1)")
    add("--wordnet", metavar="DIR", type=Path, default=WORDNET, help=f"default {WORDNET}")
    add(
        "--exclude",
        metavar="SPEC",
        nargs="+",
        default=[],
        help="held-out corpora whose sentences are left out, besides those that come with omni",
    )
    add(
        "--mixture",
        metavar="NAME=SHARE,...",
        type=_mixture,
        default=MIXTURE,
        help=f"programs and their shares; others are left out (default {usual})",
    )
    arguments = parser.parse_args(argv)
    return run_job(lambda: _synthesize(arguments), "interrupted; the same command continues")


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours < math.inf:
        raise ValueError
    return hours


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)


def _mixture(text: str) -> dict[str, float]:
    from omni.recipes.synthesize import parse_mixture

    try:
        return parse_mixture(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected NAME=SHARE,..., got {text!r}: {error}"
        ) from None


def _synthesize(arguments: argparse.Namespace) -> None:
    from omni.recipes.synthesize import Recipe, synthesize

    os.nice(_NICENESS)
    recipe = Recipe(arguments.seed, arguments.mixture, arguments.wordnet, arguments.exclude)
    out = arguments.out
    total = synthesize(
        recipe,
        out,
        arguments.hours,
        arguments.processes,
        lambda line: say(f"  {line}"),
    )
    failed = sum(total.failures.values())
    print(f"{total.utterances:,} utterances, {total.seconds / 3600:.2f} h; {failed:,} not spoken")
    print(f"index them with omni index --source wds:{out} --out INDEX")


if __name__ == "__main__":
    sys.exit(main())
