"""Arguments, exit codes and error lines that all jobs share."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn, TextIO

from omni.config import Config, load_config, shipped_configs
from omni.errors import ConfigError, ExitCode, printable
from omni.storage.fence import LeaseError
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import redact


class JobParser(argparse.ArgumentParser):
    """Parser that reads `--dry-run` as `--dry_run`, and suggests a name for an unknown argument."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_underscores(text) for text in given], namespace)

    def error(self, message: str) -> NoReturn:
        message = printable(redact(message))
        head, _, names = message.partition("unrecognized arguments: ")
        self.exit(
            ExitCode.WRONG_INPUT,
            f"error: {message if head or not names else self.unknown(names.split()[0])}\n",
        )

    def unknown(self, argument: str) -> str:
        """Describe an argument that the job does not have."""
        options = list(self._option_string_actions)
        close = difflib.get_close_matches(_with_underscores(argument), options, n=1)
        return f"{redact(argument)}: unknown argument" + (
            f" (did you mean {close[0]}?)" if close else ""
        )


def _with_underscores(text: str) -> str:
    """Replace dashes in the name of an option; options and settings have underscores."""
    name, mark, value = text.partition("=")
    if not name.startswith("--"):
        return text
    return f"--{name[2:].replace('-', '_')}{mark}{value}"


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


def positive(text: str) -> int:
    """Parse an argument that is a number of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def positive_float(text: str) -> float:
    """Parse an argument that is a finite number over 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def job_parser(job: str, doc: str | None, *more: str, **options: Any) -> JobParser:
    """Make the parser of a job; the first paragraph of `doc` describes it, the rest comes last."""
    about, *rest = (doc or "").strip().split("\n\n")
    return JobParser(
        f"omni {job}",
        description=about,
        epilog="\n\n".join([*rest, *more]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        allow_abbrev=False,
        **options,
    )


def settings_parser(job: str, doc: str | None, *sections: str) -> JobParser:
    """Make the parser of a job that takes settings, and lists `sections` of them (all if none)."""
    from omni.config.reference import sections_help

    parser = job_parser(job, doc, sections_help(job, sections), add_help=False)
    names = ", ".join(shipped_configs())
    text = f"YAML file of settings, or one that comes with omni: {names}"
    parser.add_argument("--config", metavar="FILE|NAME", help=text)
    parser.add_argument(
        "-h",
        "--help",
        nargs="?",
        metavar="SECTION",
        action=_Help,
        help="show this text, or the settings of a section",
    )
    return parser


def parse_settings(parser: JobParser, argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Parse a job's own arguments and its settings.

    Raises ConfigError for a wrong setting, an unknown argument, or without --config.
    """
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    parser.usage = f"{usage} [--SECTION.FIELD VALUE ...]"
    known, overrides = parser.parse_known_args(argv)
    for text in overrides:
        if text.startswith("--") and "." not in text.partition("=")[0]:
            raise ConfigError(f"{parser.unknown(text)}; settings are --section.field VALUE")
    config = load_config(known.config, overrides)
    if known.config is None:
        names = ", ".join(shipped_configs())
        raise ConfigError(f"--config: expected a YAML file of settings, or one of: {names}")
    return known, config


def location(text: str) -> StoragePath:
    """Parse an argument that is a path or a URI."""
    try:
        return as_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def require_extra(job: str, package: str, extra: str) -> None:
    """Raise ConfigError if a package that a job needs is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{job} needs {package}: pip install 'nanochat-omni[{extra}]'")


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines that may hold texts of a corpus: control characters show as escapes."""
    print(printable(text), file=file, flush=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """Format JSON whose control characters are escapes, so that a terminal obeys none of them."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if text.isprintable() else _HIDDEN.sub(_escaped, text)


_HIDDEN = re.compile(r"[^\n -~]")
"""All but line ends and ASCII that prints; of these, `_escaped` keeps what is printable."""


def _escaped(found: re.Match[str]) -> str:
    character = found.group()
    return character if character.isprintable() else json.dumps(character)[1:-1]


def run_job(job: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a job and return its exit code.

    ConfigError and RuntimeError end in one line on stderr; anything else is a bug and keeps its
    traceback. interrupted: the line after Ctrl-C, unless the job has a better one.
    """
    # What transformers warns of, jobs say in their own words, or do not do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Escapes for what a terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        if sys.getfilesystemencoding() != "utf-8":
            raise ConfigError(
                f"the locale's encoding is {sys.getfilesystemencoding()}, in which names of files "
                "may not exist: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            )
        code = job() or ExitCode.DONE
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # Whoever read the output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PIPE_CLOSED
    except ConfigError as error:
        print(f"error: {printable(redact(str(error)))}", file=sys.stderr)
        return ExitCode.WRONG_INPUT
    except LeaseError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return ExitCode.RUN_TAKEN
    except RuntimeError as error:
        print(f"error: {printable(redact(str(error)))}", file=sys.stderr)
        return ExitCode.FAILED
    except KeyboardInterrupt as error:
        print(str(error) or interrupted, file=sys.stderr)
        return ExitCode.INTERRUPTED
