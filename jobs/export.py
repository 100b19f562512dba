"""Write a checkpoint for transformers, for nanochat, or as a base of runs."""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.cli import job_parser, run_job, say
from jobs.decoding_arguments import CHECKPOINT, checkpoint_path

_FORMATS = "transformers: with its code; hf: Voxtral's format; omni: a small checkpoint"
_ADAPTERS = "merge adapters into the language model, or keep them apart (--to transformers)"


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("export", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", type=checkpoint_path, required=True, help=CHECKPOINT)
    add("--to", choices=("transformers", "hf", "nanochat", "omni"), required=True, help=_FORMATS)
    add("--out", type=Path, required=True, help="folder to make")
    add("--adapters", choices=("merged", "apart"), default="merged", help=_ADAPTERS)
    arguments = parser.parse_args(argv)

    def job() -> None:
        from omni.inference.export import export

        exported = export(arguments.checkpoint, arguments.to, arguments.out, arguments.adapters)
        for path in exported.files:
            print(path)
        for note in exported.notes:
            say(f"note: {note}", file=sys.stderr)

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
