"""Arguments that name a corpus, and say what its rows may hold."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jobs.cli import positive
from omni.storage.uri import CREDENTIALS, has_credentials

if TYPE_CHECKING:
    from omni.storage.http import DownloadLimits


def corpus_spec(text: str) -> str:
    """Parse an argument that names a corpus, in any form."""
    if has_credentials(text):
        scheme = text.partition("://")[0].rpartition(":")[2]
        raise argparse.ArgumentTypeError(CREDENTIALS.format(scheme=scheme))
    return text


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
