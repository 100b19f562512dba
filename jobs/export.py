"""Write a checkpoint for nanochat, for transformers (Voxtral), or as a base of runs."""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.cli import CHECKPOINT, checkpoint_path, job_parser, run_job

_FORMATS = "format; hf is Voxtral's, omni a small checkpoint for model.base"


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("export", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", type=checkpoint_path, required=True, help=CHECKPOINT)
    add("--to", choices=("nanochat", "hf", "omni"), required=True, help=_FORMATS)
    add("--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args(argv)

    def job() -> None:
        from omni.inference.export import export

        exported = export(arguments.checkpoint, arguments.to, arguments.out)
        for path in exported.files:
            print(path)
        for note in exported.notes:
            print(f"note: {note}", file=sys.stderr)

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
