"""Write a trained model in another project's format: nanochat, or transformers (Voxtral's)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.cli import run
from omni.storage.path import as_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.export", description=__doc__)
    parser.add_argument("--checkpoint", type=as_path, required=True, help="RUN/checkpoints/best")
    parser.add_argument("--to", choices=("nanochat", "hf"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args(argv)

    def job() -> None:
        from omni.inference.export import export

        for path in export(arguments.checkpoint, arguments.to, arguments.out):
            print(path)

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
