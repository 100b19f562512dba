"""Show which layers of the frozen encoder carry a label, by linear probes.

It prints a table, and writes probe.json, probe.svg and probe.html: the accuracy of each layer,
the log-mel, random weights, shuffled labels and the largest class, and the encoder.layers to use.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import (
    job_parser,
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
from omni.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("probe", __doc__)
    add = parser.add_argument
    add("corpora", nargs="+", type=corpus_spec, metavar="SPEC", help="corpora, as of --data.train")
    add(
        "--label",
        action="append",
        required=True,
        metavar="NAME",
        help="label of the utterances: speaker, language, or one of omni annotate or --keep; "
        "may be repeated",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="folder of page, figures, features")
    add(
        "--encoder",
        metavar="WEIGHTS",
        default="embedded",
        help="as encoder.weights: embedded (default), hub, or a folder",
    )
    add(
        "--disjoint",
        choices=["sentence", "speaker"],
        help="what training and test never share (default: speaker where the classes have enough "
        "of them, else sentence)",
    )
    add("--folds", metavar="N", type=_folds, default=5, help="folds of the test (default 5)")
    add(
        "--least",
        metavar="N",
        type=positive,
        default=30,
        help="utterances that a class needs, or it is left out (default 30)",
    )
    add(
        "--limit",
        metavar="N",
        type=positive,
        default=10_000,
        help="most utterances, drawn by --seed (default 10000)",
    )
    add("--seed", metavar="N", type=int, default=0, help="of draws, folds and random weights")
    add_kept_columns(parser)
    add_corpus_limits(parser)
    arguments = parser.parse_args(argv)
    return run_job(lambda: _probe(arguments), "interrupted; the same command continues")


def _folds(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, got {number}")
    return number


def _probe(arguments: argparse.Namespace) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    from omni.config.settings import EncoderConfig
    from omni.corpus.index import build_index
    from omni.errors import ManifestError
    from omni.model.download import HubError, SourceError
    from omni.storage.atomic import write_atomic
    from omni.storage.uri import public_uri
    from omni.texture.pooled import pooling_of
    from omni.texture.probe import Probing, as_json, probe
    from omni.texture.probe_page import page, standalone_svg, table

    require_extra("omni probe", "sklearn", "texture")
    out, usual = arguments.out.expanduser().absolute(), EncoderConfig()
    out.mkdir(parents=True, exist_ok=True)
    labels = list(dict.fromkeys(arguments.label))
    try:
        index = build_index(
            arguments.corpora,
            allow_absolute=arguments.allow_absolute,
            downloads=download_limits(arguments),
            keep=tuple(dict.fromkeys(arguments.keep)),
        )
        weights = arguments.encoder
        if Path(weights).expanduser().is_dir():  # Tasks have another working directory.
            weights = str(Path(weights).expanduser().absolute())
        pooling = pooling_of(weights, usual.mode, usual.margin_seconds, arguments.seed)
    except ManifestError as error:
        raise ConfigError(str(error)) from None
    except HubError as error:
        raise RuntimeError(f"--encoder: {error}") from error
    except SourceError as error:
        raise ConfigError(f"--encoder: {error}") from None
    how = Probing(
        labels,
        arguments.disjoint,
        arguments.folds,
        arguments.least,
        arguments.limit,
        arguments.seed,
    )
    corpora = list(map(public_uri, arguments.corpora))
    result = probe(
        corpora,
        index,
        how,
        pooling,
        out / "features",
        lambda line: say(f"  {line}"),
    )
    write_atomic(out / "probe.json", json.dumps(as_json(result), indent=1).encode())
    write_atomic(out / "probe.html", page(result).encode())
    write_atomic(out / "probe.svg", standalone_svg(result).encode())
    head, rows = table(result)
    shown = Table(*head, title="accuracy in %, with 95 % intervals", box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    Console(markup=False, highlight=False, width=max(80, 30 + 24 * len(labels))).print(shown)
    for note in result.notes:
        say(f"note: {note}")
    print("* best layer of a label, = no difference from it shown (paired bootstrap)")
    print(f"use --encoder.layers '{result.setting}'; page: {out / 'probe.html'}")


if __name__ == "__main__":
    sys.exit(main())
