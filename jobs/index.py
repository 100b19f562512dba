"""Index corpora of any shape for training; the same command continues an interrupted one.

The folder that it writes is a manifest: --data.train DIR. docs/corpora.md shows every SPEC.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import run


def main(argv: list[str] | None = None) -> int:
    from omni.data.sources.base import COLUMNS

    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m jobs.index", description=about, epilog=more)
    parser.add_argument("--source", metavar="SPEC", action="append", required=True)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--language", help="of utterances that do not say")
    parser.add_argument("--audio_folder", default="", help="put before recordings' paths")
    parser.add_argument("--number_ids", action="store_true", help="make ids of places")
    parser.add_argument("--allow_absolute", action="store_true", help="files may lie anywhere")
    parser.add_argument(
        "--rows_per_part", type=int, default=1000, help="utterances a task (default 1000)"
    )
    for name, usual in COLUMNS.items():
        parser.add_argument(f"--{name}_column", metavar="NAME", help=f"usual: {', '.join(usual)}")
    arguments = parser.parse_args(argv)
    return run(lambda: _index(arguments))


def _index(arguments: argparse.Namespace) -> None:
    from omni.config import ConfigError
    from omni.data.built import summary_lines
    from omni.data.sources.base import COLUMNS, Options
    from omni.index import make_index

    if arguments.rows_per_part < 1:
        raise ConfigError(f"--rows_per_part: expected 1 or more, got {arguments.rows_per_part}")
    given = {name: getattr(arguments, f"{name}_column") for name in COLUMNS}
    options = Options(
        columns={name: column for name, column in given.items() if column},
        language=arguments.language,
        audio_folder=arguments.audio_folder,
        number_ids=arguments.number_ids,
        rows_per_part=arguments.rows_per_part,
        allow_absolute=arguments.allow_absolute,
    )
    specs, out = arguments.source, arguments.out
    done = make_index(specs, out, options, lambda line: print(f"  {line}", flush=True))
    print(f"{done['done']:,} of {done['parts']:,} parts made, the others were there")
    print("\n".join(summary_lines(done)))
    print(f"train on it with --data.train {out}")


if __name__ == "__main__":
    sys.exit(main())
