"""Index corpora of any shape for training; the same command continues an interrupted one.

The folder that it writes is a manifest: --data.train DIR. docs/corpora.md shows every SPEC.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.cli import run
from omni.storage.path import as_path

if TYPE_CHECKING:
    from omni.audio.vad import Segmenting


_SECONDS = {
    "longest": "an utterance is no longer; longer recordings are cut",
    "shortest": "speech that is shorter is left out",
    "silence": "a pause that parts utterances",
    "padding": "kept before and after speech",
}


def main(argv: list[str] | None = None) -> int:
    from omni.audio.vad import Segmenting
    from omni.corpus.sources.base import COLUMNS

    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m jobs.index", description=about, epilog=more)
    parser.add_argument("--source", metavar="SPEC", action="append", required=True)
    parser.add_argument("--out", metavar="DIR", type=as_path, required=True)
    parser.add_argument("--language", help="of utterances that do not say")
    parser.add_argument("--audio_folder", default="", help="put before recordings' paths")
    parser.add_argument("--number_ids", action="store_true", help="make ids of places")
    parser.add_argument("--allow_absolute", action="store_true", help="files may lie anywhere")
    parser.add_argument(
        "--rows_per_part", type=int, help="utterances a task (default 1000; 10 with --segment)"
    )
    parser.add_argument(
        "--segment",
        choices=["vad"],
        help="keep recordings without text, and cut the long ones by voice activity, for "
        "jobs.transcribe",
    )
    for name, what in _SECONDS.items():
        default = getattr(Segmenting, name)
        meaning = f"with --segment: {what} (default {default:g})"
        parser.add_argument(f"--{name}_seconds", metavar="S", type=float, help=meaning)
    for name, usual in COLUMNS.items():
        parser.add_argument(f"--{name}_column", metavar="NAME", help=f"usual: {', '.join(usual)}")
    arguments = parser.parse_args(argv)
    return run(lambda: _index(arguments))


def _index(arguments: argparse.Namespace) -> None:
    from omni.corpus.build import make_index
    from omni.corpus.built_index import summary_lines
    from omni.corpus.sources.base import COLUMNS, Options
    from omni.errors import ConfigError

    rows_per_part = arguments.rows_per_part
    if rows_per_part is None:  # a task that cuts long recordings takes its time
        rows_per_part = 10 if arguments.segment else 1000
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
        segment=_segmenting(arguments),
    )
    specs, out = arguments.source, arguments.out
    done = make_index(specs, out, options, lambda line: print(f"  {line}", flush=True))
    print(f"{done['done']:,} of {done['parts']:,} parts made, the others were there")
    print("\n".join(summary_lines(done)))
    if done["without_text"] == done["utterances"]:
        print(f"write it down: python -m jobs.transcribe --checkpoint CHECKPOINT {out}")
    else:
        print(f"train on it with --data.train {out}")


def _segmenting(arguments: argparse.Namespace) -> Segmenting | None:
    from omni.audio.vad import Segmenting
    from omni.errors import ConfigError

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
