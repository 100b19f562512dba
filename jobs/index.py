"""Index corpora of any format for training, or continue to index them.

The folder that it writes is a corpus: --data.train DIR. docs/corpora.md shows every SPEC.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.cli import (
    job_parser,
    location,
    run_job,
    say,
)
from jobs.corpus_arguments import (
    add_corpus_limits,
    add_kept_columns,
    corpus_spec,
    download_limits,
)
from omni.errors import ConfigError, counted

if TYPE_CHECKING:
    from omni.audio.vad import Segmenting

_SECONDS = {
    "longest": "cut longer spans",
    "shortest": "leave out shorter speech",
    "silence": "separate spans at pauses of this length",
    "padding": "keep this much before and after speech",
}


def main(argv: list[str] | None = None) -> int:
    from omni.audio.vad import Segmenting
    from omni.corpus.lengths import DURATION_TOLERANCE
    from omni.corpus.sources.base import COLUMNS

    parser = job_parser("index", __doc__)
    add = parser.add_argument
    add(
        "--source",
        metavar="SPEC",
        type=corpus_spec,
        action="append",
        required=True,
        help="corpus; may be repeated",
    )
    add("--out", metavar="DIR", type=location, required=True, help="folder or URI of the index")
    add("--language", metavar="CODE", help="language of utterances that name none")
    add("--audio_folder", metavar="DIR", default="", help="prefix of the paths of recordings")
    add_kept_columns(parser)
    add("--number_ids", action="store_true", help="make ids from positions in the source")
    add_corpus_limits(parser)
    add(
        "--rows_per_part",
        metavar="N",
        type=int,
        help="utterances per task (default 1000; 10 with --segment)",
    )
    add(
        "--duration_tolerance",
        metavar="SHARE",
        type=float,
        default=DURATION_TOLERANCE,
        help="share of a corpus's own duration that a recording may lack before it is rejected "
        f"(default {DURATION_TOLERANCE:g})",
    )
    add(
        "--segment",
        choices=["vad"],
        help="keep recordings without text, and cut long ones by voice activity, for "
        "omni transcribe",
    )
    for name, meaning in _SECONDS.items():
        default = getattr(Segmenting, name)
        text = f"with --segment: {meaning} (seconds, default {default:g})"
        add(f"--{name}_seconds", metavar="S", type=float, help=text)
    for name, usual in COLUMNS.items():
        text = f"column of the {name} (default: {', '.join(usual)})"
        add(f"--{name}_column", metavar="NAME", help=text)
    arguments = parser.parse_args(argv)
    return run_job(lambda: _index(arguments), "interrupted; the same command continues")


def _index(arguments: argparse.Namespace) -> None:
    from omni.corpus.build_tasks import make_index
    from omni.corpus.built_index import summary_lines
    from omni.corpus.sources.base import COLUMNS, Options

    rows_per_part = arguments.rows_per_part
    if rows_per_part is None:  # Cutting a long recording takes far longer than reading a row.
        rows_per_part = 10 if arguments.segment else 1000
    if not 0 <= arguments.duration_tolerance <= 1:
        given_share = arguments.duration_tolerance
        raise ConfigError(f"--duration_tolerance: expected a share of 0 to 1, got {given_share}")
    if rows_per_part < 1:
        raise ConfigError(f"--rows_per_part: expected 1 or more, got {rows_per_part}")
    given = {name: getattr(arguments, f"{name}_column") for name in COLUMNS}
    options = Options(
        columns={name: column for name, column in given.items() if column},
        language=arguments.language,
        audio_folder=arguments.audio_folder,
        number_ids=arguments.number_ids,
        rows_per_part=rows_per_part,
        allow_absolute=arguments.allow_absolute,
        downloads=download_limits(arguments),
        segment=_segmenting(arguments),
        duration_tolerance=arguments.duration_tolerance,
        keep=tuple(dict.fromkeys(arguments.keep)),
    )
    specs, out = arguments.source, arguments.out
    done = make_index(specs, out, options, lambda line: say(f"  {line}"))
    print(f"{done['done']:,} of {counted(done['parts'], 'part')} made", end="")
    print("; the others were there already" if done["done"] < done["parts"] else "")
    say("\n".join(summary_lines(done)))
    if done["without_text"] == done["utterances"]:
        print(f"transcribe it with python -m jobs.transcribe --checkpoint CHECKPOINT {out}")
    else:
        print(f"train on it with --data.train {out}")


def _segmenting(arguments: argparse.Namespace) -> Segmenting | None:
    from omni.audio.vad import Segmenting

    values = {name: getattr(arguments, f"{name}_seconds") for name in _SECONDS}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.segment is None:
        if given:
            raise ConfigError(f"--{next(iter(given))}_seconds: expected --segment vad beside it")
        return None
    try:
        return Segmenting(**given)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


if __name__ == "__main__":
    sys.exit(main())
