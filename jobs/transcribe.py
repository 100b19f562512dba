"""Transcribe recordings, or the rows of an index, to JSON lines on stdout.

Each recording is a line {"audio", "text"}. With --segment vad, each span of speech is a line with
its times in seconds: {"audio", "offset", "duration", "text"}. Of a DIR that omni index wrote, each
row is a line with its id. A recording that cannot be read has "error" instead of "text". A text
that ends where decoding was stopped (--max_new_tokens, or eval.max_new_tokens of the training) has
"cut": true.
"""

from __future__ import annotations

import argparse
import json
import sys

from jobs.cli import (
    CHECKPOINT,
    add_decoding,
    checkpoint_path,
    corpus_spec,
    job_parser,
    positive,
    run_job,
)
from omni.config.field_types import OMNI_TINY
from omni.errors import ConfigError, counted
from omni.storage.filesystem import StorageError
from omni.storage.path import as_path
from omni.storage.uri import public_uri, report_storage_errors


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("transcribe", __doc__)
    add = parser.add_argument
    usual = f"{CHECKPOINT} (default omni-tiny, a small model for English)"
    add("--checkpoint", metavar="DIR", type=checkpoint_path, default=OMNI_TINY, help=usual)
    add(
        "files",
        nargs="+",
        type=corpus_spec,
        metavar="FILE|DIR",
        help="recording that libsndfile reads, or index",
    )
    add("--segment", choices=["vad"], help="write a line for each span of speech, with its times")
    add("--language", metavar="CODE", help="language, for a model trained with data.language_tag")
    add("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    add("--max_new_tokens", type=positive, metavar="N", help="most tokens of an answer")
    add_decoding(parser)
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _transcribe(arguments))


def _transcribe(arguments: argparse.Namespace) -> None:
    import torch

    from omni.inference.rows import transcribe_index
    from omni.inference.spans import transcribe_speech
    from omni.inference.transcriber import Transcriber, transcribe_files

    torch.set_num_threads(arguments.threads)
    transcriber = Transcriber.load(
        arguments.checkpoint,
        arguments.device,
        arguments.max_new_tokens,
        arguments.decode,
        arguments.ctc_weight,
    )
    unread = cut = 0
    for name in arguments.files:
        if _is_folder(name):
            rows = transcribe_index(transcriber, name, arguments.language)
        elif arguments.segment:
            rows = transcribe_speech(transcriber, [name], arguments.language)
        else:
            rows = transcribe_files(transcriber, [name], arguments.language)
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
            unread += "error" in row
            cut += "cut" in row
    if cut:
        print(f"{counted(cut, 'text')} reached --max_new_tokens and are cut", file=sys.stderr)
    if unread:
        raise RuntimeError(f"{counted(unread, 'recording')} could not be read")


def _is_folder(name: str) -> bool:
    with report_storage_errors(public_uri(name)):
        try:
            return as_path(name).is_dir()
        except StorageError as error:
            raise ConfigError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
