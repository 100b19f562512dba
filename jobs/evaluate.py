"""Score a checkpoint on a manifest: WER and CER with Whisper's normaliser."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import run
from omni.storage.path import as_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=as_path, required=True, help="RUN/checkpoints/best")
    parser.add_argument("--data", required=True, help="manifest, or embedded:train|dev|test")
    parser.add_argument(
        "--allow_absolute", action="store_true", help="the manifest may name files anywhere"
    )
    parser.add_argument("--out", type=Path, help="write one JSON line per utterance here")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from omni.inference.transcriber import Transcriber, evaluate
    from omni.metrics.run_files import append_json

    torch.set_num_threads(arguments.threads)
    transcriber = Transcriber.load(arguments.checkpoint, arguments.device)
    summary, rows = evaluate(transcriber, arguments.data, allow_absolute=arguments.allow_absolute)
    if arguments.out is not None:
        arguments.out.unlink(missing_ok=True)
        append_json(arguments.out, rows)
    print(json.dumps(summary, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
