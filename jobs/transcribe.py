"""Write down recordings: JSON lines {"audio", "text"} on stdout, in the order of the files."""

from __future__ import annotations

import argparse
import json
import sys

from jobs.cli import run
from omni.place import place


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.transcribe", description=__doc__)
    parser.add_argument("--checkpoint", type=place, required=True, help="RUN/checkpoints/best")
    parser.add_argument("files", nargs="+", metavar="FILE", help="any format libsndfile reads")
    parser.add_argument("--language", help="its code, for a model trained with data.language_tag")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run(lambda: _transcribe(arguments))


def _transcribe(arguments: argparse.Namespace) -> None:
    import torch

    from omni.evaluate import Transcriber, transcribe_files

    torch.set_num_threads(arguments.threads)
    transcriber = Transcriber.load(arguments.checkpoint, arguments.device)
    unread = 0
    for row in transcribe_files(transcriber, arguments.files, arguments.language):
        print(json.dumps(row, ensure_ascii=False), flush=True)
        unread += "error" in row
    if unread:
        raise RuntimeError(f"{unread} of {len(arguments.files)} files could not be read")


if __name__ == "__main__":
    sys.exit(main())
