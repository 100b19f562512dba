"""What all jobs share: settings from the command line, exit codes, one clear last line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

from omni.config import Config, load_config
from omni.errors import ConfigError

EPILOG = (
    "Every setting can be given as --section.field VALUE, e.g. --optim.lr 3e-4; lists by repeating "
    "it. omni/config.py documents each one."
)


def parse_config(
    name: str, about: str, argv: list[str] | None, flags: Mapping[str, str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """--config FILE and dotted overrides, and a job's own flags with what they do."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=about,
        epilog=EPILOG,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, see configs/")
    for flag, help_text in (flags or {}).items():
        parser.add_argument(f"--{flag}", action="store_true", help=help_text)
    known, overrides = parser.parse_known_args(argv)
    return load_config(known.config, overrides), known


def run(job: Callable[[], None]) -> int:
    """Exit code of a job: 0, 2 for wrong settings or input, 1 for a failure said in one line.

    Jobs fail with RuntimeError; anything else is a bug and keeps its traceback.
    """
    try:
        job()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0
