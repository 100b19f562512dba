"""Measure the WER and CER of a checkpoint, with Whisper's text normalizer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import (
    CHECKPOINT,
    add_corpus_limits,
    add_decoding,
    checkpoint_path,
    corpus_spec,
    download_limits,
    job_parser,
    positive,
    run_job,
)


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", type=checkpoint_path, required=True, help=CHECKPOINT)
    add(
        "--data",
        type=corpus_spec,
        required=True,
        help="corpus (any SPEC of omni index), or embedded:test",
    )
    add_corpus_limits(parser)
    add(
        "--metric",
        metavar="MODULE:CLASS",
        action="append",
        default=[],
        help="metric of your own beside WER and CER (docs/plug-ins.md); may be repeated",
    )
    add("--out", type=Path, help="write one JSON line per utterance here")
    add("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    add("--max_new_tokens", type=positive, metavar="N", help="most tokens of an answer")
    add_decoding(parser)
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from omni.inference.rows import evaluate
    from omni.inference.transcriber import Transcriber
    from omni.metrics.run_files import append_json
    from omni.metrics.text_metric import load_metrics

    torch.set_num_threads(arguments.threads)
    metrics = load_metrics(arguments.metric, "--metric")
    transcriber = Transcriber.load(
        arguments.checkpoint,
        arguments.device,
        arguments.max_new_tokens,
        arguments.decode,
        arguments.ctc_weight,
    )
    summary, rows = evaluate(
        transcriber,
        arguments.data,
        allow_absolute=arguments.allow_absolute,
        downloads=download_limits(arguments),
        metrics=metrics,
    )
    if arguments.out is not None:
        arguments.out.unlink(missing_ok=True)
        append_json(arguments.out, rows)
    print(json.dumps(summary, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
