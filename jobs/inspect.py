"""Look at a corpus or at a run's plan: one page with figures, and utterances to see and hear."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.inspect", description=__doc__)
    parser.add_argument(
        "target", metavar="INDEX|RUN", help="manifest, tar, embedded:train|dev|test, or runs/NAME"
    )
    parser.add_argument(
        "--out", type=Path, help="default: inspect.html, in the run's folder or here"
    )
    parser.add_argument("--utterances", type=_number, default=12, help="to hear (default 12)")
    parser.add_argument("--seed", type=_number, default=0, help="draws them (default 0)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json that counts tokens")
    parser.add_argument(
        "--allow_absolute", action="store_true", help="the manifest may name files anywhere"
    )
    arguments = parser.parse_args(argv)
    return run(lambda: _inspect(arguments))


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)


def _inspect(arguments: argparse.Namespace) -> None:
    from omni.report.corpus_page import write_page

    path = write_page(
        arguments.target,
        arguments.out,
        utterances=arguments.utterances,
        seed=arguments.seed,
        tokenizer=arguments.tokenizer,
        allow_absolute=arguments.allow_absolute,
    )
    size = path.stat().st_size if isinstance(path, Path) else path.info().size
    print(f"{path}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
