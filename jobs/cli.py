"""Arguments, exit codes and error lines that all jobs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from omni.config import Config, load_config
from omni.errors import ConfigError


class _Help(argparse.Action):
    """`--help`: the arguments of a job; `--help SECTION`: the settings of a section, or all."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from omni.config.reference import settings_help

        if values is None:
            parser.print_help()
        else:
            try:
                print(settings_help(str(values)))
            except ConfigError as error:
                raise argparse.ArgumentError(self, str(error)) from None
        parser.exit()


def job_parser(job: str, doc: str | None, *more: str, **options: Any) -> argparse.ArgumentParser:
    """Make the parser of a job; the first paragraph of `doc` describes it, the rest comes last."""
    about, *rest = (doc or "").strip().split("\n\n")
    return argparse.ArgumentParser(
        f"omni {job}",
        description=about,
        epilog="\n\n".join([*rest, *more]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        allow_abbrev=False,
        **options,
    )


def settings_parser(job: str, doc: str | None, *sections: str) -> argparse.ArgumentParser:
    """Make the parser of a job that takes settings, and lists `sections` of them (all if none)."""
    from omni.config.reference import sections_help

    parser = job_parser(job, doc, sections_help(job, sections), add_help=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings: see configs/")
    parser.add_argument(
        "-h",
        "--help",
        nargs="?",
        metavar="SECTION",
        action=_Help,
        help="show this text, or the settings of a section",
    )
    return parser


def parse_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, Config]:
    """Parse a job's own arguments and its settings. Raises ConfigError for a wrong setting."""
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    parser.usage = f"{usage} [--SECTION.FIELD VALUE ...]"
    known, overrides = parser.parse_known_args(argv)
    return known, load_config(known.config, overrides)


def run_job(job: Callable[[], int | None]) -> int:
    """Run a job and return its exit code: 2 for a wrong setting or input, 1 for a failure.

    ConfigError and RuntimeError end in one line on stderr; anything else is a bug and keeps its
    traceback.
    """
    try:
        return job() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
