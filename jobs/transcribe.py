"""Write down recordings, or the rows of an index: JSON lines on stdout, in their order.

{"audio", "text"} for each file. With --segment vad a line for each span of speech, with its times:
{"audio", "offset", "duration", "text"}. For DIR, which jobs.index wrote, a line for each row, with
its id, and times where it has some. Where a recording cannot be read, "error" instead of "text".
"""

from __future__ import annotations

import argparse
import json
import sys

from jobs.cli import run
from omni.errors import ConfigError
from omni.storage.path import StorageError, as_path, public_uri, reason_of


def main(argv: list[str] | None = None) -> int:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m jobs.transcribe", description=about, epilog=more)
    parser.add_argument("--checkpoint", type=as_path, required=True, help="RUN/checkpoints/best")
    parser.add_argument(
        "files", nargs="+", metavar="FILE|DIR", help="any format libsndfile reads; an index"
    )
    parser.add_argument(
        "--segment",
        choices=["vad"],
        help="a line with times for each span in which somebody speaks",
    )
    parser.add_argument("--language", help="its code, for a model trained with data.language_tag")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run(lambda: _transcribe(arguments))


def _transcribe(arguments: argparse.Namespace) -> None:
    import torch

    from omni.inference.spans import transcribe_index, transcribe_speech
    from omni.inference.transcriber import Transcriber, transcribe_files

    torch.set_num_threads(arguments.threads)
    transcriber = Transcriber.load(arguments.checkpoint, arguments.device)
    unread = 0
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
    if unread:
        raise RuntimeError(f"{unread} recordings could not be read")


def _is_folder(name: str) -> bool:
    try:
        return as_path(name).is_dir()
    except StorageError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:  # of storage, which may answer later
        raise RuntimeError(f"{public_uri(name)}: {reason_of(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
