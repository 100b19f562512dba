"""Arguments of the jobs that decode with a checkpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jobs.cli import positive, positive_float
from omni.errors import ConfigError
from omni.storage.path import StoragePath

if TYPE_CHECKING:
    from omni.model.decode import DecodingOptions

CHECKPOINT = "run directory (its best checkpoint), one of its checkpoints, or omni-tiny"


def checkpoint_path(text: str) -> StoragePath:
    """Return the checkpoint that --checkpoint names; of a run's folder, its best one."""
    from omni.checkpoint.base import checkpoint_folder

    try:
        return checkpoint_folder(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    """Add the arguments that replace the training's settings of decoding."""
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
        help="answers of the language model to search side by side (default eval.beam)",
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
