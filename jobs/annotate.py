"""Measure pitch, rate, energy and pauses of a corpus, as labels of its utterances.

The folder that it writes is a corpus: --data.train DIR. docs/texture.md says what is measured.
"""

from __future__ import annotations

import argparse
import sys

from jobs.cli import (
    job_parser,
    location,
    positive,
    require_extra,
    run_job,
    say,
)
from jobs.corpus_arguments import (
    add_corpus_limits,
    add_kept_columns,
    corpus_spec,
    download_limits,
)
from omni.errors import counted


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("annotate", __doc__)
    add = parser.add_argument
    add(
        "corpora",
        nargs="+",
        type=corpus_spec,
        metavar="SPEC",
        help="an index folder, or corpora of any shape that omni index reads",
    )
    add("--out", metavar="DIR", type=location, required=True, help="folder or URI of the index")
    add(
        "--with",
        dest="measures",
        metavar="MEASURE,...",
        type=_measures,
        default="pitch,rate,energy,pauses",
        help="what to measure (default pitch,rate,energy,pauses)",
    )
    add(
        "--within",
        choices=["corpus", "language", "speaker"],
        default="corpus",
        help="whose terciles become the classes low, mid and high (default corpus)",
    )
    add(
        "--least",
        metavar="N",
        type=positive,
        default=30,
        help="utterances that a speaker or language needs for classes of its own (default 30)",
    )
    add(
        "--like",
        metavar="DIR",
        type=location,
        help="annotated index whose bounds of the classes to use, for data to evaluate on",
    )
    add_kept_columns(parser)
    add_corpus_limits(parser)
    arguments = parser.parse_args(argv)
    return run_job(lambda: _annotate(arguments), "interrupted; the same command continues")


def _measures(text: str) -> tuple[str, ...]:
    from omni.texture.labels import MEASURES

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in MEASURES]:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(MEASURES)}, got {unknown[0]!r}"
        )
    return names


def _annotate(arguments: argparse.Namespace) -> None:
    from omni.corpus.sources import Options
    from omni.texture.annotate import Annotating, annotate, summary_lines

    require_extra("omni annotate", "swift_f0", "texture")
    options = Options(
        allow_absolute=arguments.allow_absolute,
        downloads=download_limits(arguments),
        keep=tuple(dict.fromkeys(arguments.keep)),
    )
    how = Annotating(arguments.measures, arguments.within, arguments.least, arguments.like)
    done = annotate(
        arguments.corpora,
        arguments.out,
        how,
        options,
        lambda line: say(f"  {line}"),
    )
    print(f"{done['done']:,} of {counted(done['units'], 'unit')} measured")
    say("\n".join(summary_lines(done)))
    print(f"train on it with --data.train {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
