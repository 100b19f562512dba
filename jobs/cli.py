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
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from omni.config import Config, load_config, shipped_configs
from omni.errors import ConfigError, ExitCode, printable
from omni.storage.fence import LeaseError
from omni.storage.path import StoragePath, as_path
from omni.storage.uri import CREDENTIALS, has_credentials, redact

if TYPE_CHECKING:
    from omni.model.decode import DecodingOptions
    from omni.storage.http import DownloadLimits

CHECKPOINT = "run directory (its best checkpoint), one of its checkpoints, or omni-tiny"


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


def add_corpus_limits(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what the rows of a corpus may name (see `download_limits`)."""
    from omni.storage.http import DEFAULT_LIMITS as usual

    add = parser.add_argument
    add("--allow_absolute", action="store_true", help="let corpora name files anywhere")
    add(
        "--allow_private_hosts",
        action="store_true",
        help="let rows name recordings on web servers of private and local networks",
    )
    add(
        "--download_mb",
        metavar="N",
        type=positive,
        default=usual.megabytes,
        help=f"largest recording fetched from a server, in MiB (default {usual.megabytes})",
    )
    add(
        "--download_seconds",
        metavar="S",
        type=positive,
        default=int(usual.seconds),
        help=f"longest time that fetching one may take (default {usual.seconds:g})",
    )


def download_limits(arguments: argparse.Namespace) -> DownloadLimits:
    """Return the limits that the arguments of `add_corpus_limits` give."""
    from omni.storage.http import DownloadLimits

    return DownloadLimits(
        arguments.download_mb, float(arguments.download_seconds), arguments.allow_private_hosts
    )


def positive_float(text: str) -> float:
    """Parse an argument that is a finite number over 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def _temperature(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return number


def _top_p(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return number


def _seed(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return number


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that replace the training's settings of decoding, and the beam."""
    add = parser.add_argument
    add("--max_new_tokens", type=positive, metavar="N", help="most tokens of an answer")
    add(
        "--decode",
        choices=["lm", "ctc", "joint"],
        help="decoder of what is said: language model, CTC head, or both (default eval.decode)",
    )
    add(
        "--ctc_weight",
        type=positive_float,
        metavar="W",
        help="weight of CTC in decoding by both (default eval.ctc_weight)",
    )
    add(
        "--beam",
        type=positive,
        metavar="N",
        default=1,
        help="answers of the language model to search side by side (default 1: greedy)",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that let the language model draw its answers."""
    add = parser.add_argument
    add(
        "--temperature",
        type=_temperature,
        metavar="T",
        default=0.0,
        help="draw answers by the language model alone; 0: write the most probable (default 0)",
    )
    add(
        "--top_p",
        type=_top_p,
        metavar="P",
        help="draw from the fewest tokens whose probabilities add up to P (default 1)",
    )
    add("--seed", type=_seed, metavar="N", help="seed of what is drawn (default 0)")


def decoding_options(arguments: argparse.Namespace) -> DecodingOptions:
    """Return the settings that the arguments of `add_decoding` and `add_sampling` give.

    Raises ConfigError for settings of draws without a temperature.
    """
    from omni.model.decode import DecodingOptions
    from omni.model.lm.sampling import Sampling

    drawn = {"top_p": arguments.top_p, "seed": arguments.seed}
    given = {name: value for name, value in drawn.items() if value is not None}
    if given and not arguments.temperature:
        raise ConfigError(f"--{next(iter(given))}: expected --temperature above 0 beside it")
    return DecodingOptions(
        arguments.max_new_tokens,
        arguments.decode,
        arguments.ctc_weight,
        arguments.beam,
        Sampling(arguments.temperature, **given),
    )


def add_actors(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a corpus is transcribed."""
    add = parser.add_argument
    add(
        "--actors",
        metavar="N",
        type=positive,
        help="transcribe corpora in N processes of Ray (RAY_ADDRESS, or here; default: this one)",
    )
    add(
        "--gpus",
        metavar="SHARE",
        type=positive_float,
        default=0.0,
        help="GPUs of each process, such as 1 or 0.5, with --device cuda (default 0)",
    )
    add("--cache", metavar="DIR", help="feature cache to use and fill, such as data.cache")


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


def corpus_spec(text: str) -> str:
    """Parse an argument that names a corpus, in any form."""
    if has_credentials(text):
        scheme = text.partition("://")[0].rpartition(":")[2]
        raise argparse.ArgumentTypeError(CREDENTIALS.format(scheme=scheme))
    return text


def require_extra(job: str, package: str, extra: str) -> None:
    """Raise ConfigError if a package that a job needs is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{job} needs {package}: pip install 'nanochat-omni[{extra}]'")


def add_kept_columns(parser: argparse.ArgumentParser) -> None:
    """Add --keep, the columns of a corpus that become labels."""
    parser.add_argument(
        "--keep",
        metavar="COLUMN,...",
        type=_kept_columns,
        action="extend",
        default=[],
        help="columns of the corpus that become labels of its utterances; may be repeated",
    )


def _kept_columns(text: str) -> list[str]:
    from omni.config.field_types import kept_columns

    try:
        return kept_columns(name.strip() for name in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def checkpoint_path(text: str) -> StoragePath:
    """Return the checkpoint that --checkpoint names; of a run's folder, its best one."""
    from omni.checkpoint.base import checkpoint_folder

    try:
        return checkpoint_folder(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
