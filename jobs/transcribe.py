"""Transcribe recordings to JSON lines on stdout, or a corpus into a folder.

Each recording is a line {"audio", "text"}. With --segment vad, each span of speech is a line with
its times in seconds: {"audio", "offset", "duration", "text"}. Of a DIR that omni index wrote, each
row is a line with its id. A recording that cannot be read has "error" instead of "text". A text
that ends where decoding was stopped (--max_new_tokens, or eval.max_new_tokens of the training) has
"cut": true.

A corpus (any SPEC of omni index, or a DIR of it with --out) is transcribed into the folder --out,
a corpus for omni train. What is finished there is not done again: the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.cli import (
    job_parser,
    json_text,
    location,
    positive_float,
    run_job,
    say,
)
from jobs.corpus_arguments import add_corpus_limits, corpus_spec, download_limits
from jobs.decoding_arguments import (
    CHECKPOINT,
    add_actors,
    add_decoding,
    add_sampling,
    checkpoint_path,
    decoding_options,
)
from omni.config.field_types import OMNI_TINY
from omni.errors import ConfigError, counted
from omni.storage.filesystem import StorageError
from omni.storage.path import as_path
from omni.storage.uri import public_uri, report_storage_errors

if TYPE_CHECKING:
    from omni.inference.transcriber import Transcriber


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("transcribe", __doc__)
    add = parser.add_argument
    usual = f"{CHECKPOINT} (default omni-tiny, a small model for English)"
    add("--checkpoint", metavar="DIR", type=checkpoint_path, default=OMNI_TINY, help=usual)
    add(
        "files",
        nargs="+",
        type=corpus_spec,
        metavar="FILE|DIR|SPEC",
        help="recording that libsndfile reads, index, or corpus",
    )
    add("--out", metavar="DIR", type=location, help="folder of a corpus, or of files by --format")
    add(
        "--format",
        choices=["parquet", "jsonl", "txt", "srt", "vtt", "json"],
        help="of a corpus parquet (default) or jsonl; of recordings txt, srt, vtt, json with times",
    )
    add(
        "--min_confidence",
        metavar="P",
        type=positive_float,
        default=0.0,
        help="leave utterances of a corpus out whose confidence is lower, and those that are cut",
    )
    add_actors(parser)
    add_corpus_limits(parser)
    add("--segment", choices=["vad"], help="write a line for each span of speech, with its times")
    add("--language", metavar="CODE", help="language, for a model trained with data.language_tag")
    add("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    add_decoding(parser)
    add_sampling(parser)
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _transcribe(arguments))


def _transcribe(arguments: argparse.Namespace) -> None:
    import torch

    from omni.inference.rows import transcribe_index
    from omni.inference.spans import transcribe_speech
    from omni.inference.transcriber import Transcriber, transcribe_files

    if any(is_corpus(name) for name in arguments.files) or (
        arguments.out is not None and arguments.format in (None, "parquet", "jsonl")
    ):
        _transcribe_corpus(arguments)
        return
    for name in ("actors", "min_confidence", "cache"):
        if getattr(arguments, name):
            raise ConfigError(f"--{name}: expected a corpus and --out DIR")
    torch.set_num_threads(arguments.threads)
    transcriber = Transcriber.load(
        arguments.checkpoint, arguments.device, decoding_options(arguments)
    )
    if arguments.format is not None:
        _write_files(transcriber, arguments)
        return
    unread = cut = 0
    for name in arguments.files:
        if _is_folder(name):
            rows = transcribe_index(transcriber, name, arguments.language)
        elif arguments.segment:
            rows = transcribe_speech(transcriber, [name], arguments.language)
        else:
            rows = transcribe_files(transcriber, [name], arguments.language)
        for row in rows:
            print(json_text(row), flush=True)
            unread += "error" in row
            cut += "cut" in row
    if cut:
        print(f"{counted(cut, 'text')} reached --max_new_tokens and are cut", file=sys.stderr)
    if unread:
        raise RuntimeError(f"{counted(unread, 'recording')} could not be read")


def _transcribe_corpus(arguments: argparse.Namespace) -> None:
    """Transcribe one corpus into --out."""
    from omni.audio.vad import Segmenting
    from omni.corpus.sources import Options
    from omni.inference.corpora import transcribe_to_corpus
    from omni.inference.pipeline import Actors
    from omni.inference.shards import Decoder

    if len(arguments.files) > 1:
        raise ConfigError("a corpus: expected it alone, and no other file")
    if arguments.out is None:
        raise ConfigError("--out: expected a folder for the transcripts of a corpus")
    if arguments.format not in (None, "parquet", "jsonl"):
        raise ConfigError(f"--format {arguments.format}: expected parquet or jsonl for a corpus")
    [spec] = arguments.files
    made = transcribe_to_corpus(
        spec,
        arguments.out,
        Decoder(
            str(arguments.checkpoint),
            arguments.device,
            arguments.threads,
            decoding_options(arguments),
            arguments.language,
            arguments.cache,
        ),
        Options(
            allow_absolute=arguments.allow_absolute,
            downloads=download_limits(arguments),
            segment=Segmenting(),
            rewrite_texts=True,
            rows_per_part=100,
        ),
        actors=arguments.actors and Actors(arguments.actors, arguments.gpus),
        wanted=arguments.format or "parquet",
        min_confidence=arguments.min_confidence,
        say=lambda line: say(f"  {line}", file=sys.stderr),
    )
    print(
        f"{counted(made.utterances, 'utterance')}, {made.seconds / 3600:.2f} h in {arguments.out}"
    )
    for reason, count in sorted(made.left_out.items()):
        say(f"left out: {count:,} {reason}")
    if made.cut:
        print(f"{counted(made.cut, 'text')} reached --max_new_tokens and are cut", file=sys.stderr)
    if made.unread:
        raise RuntimeError(f"{counted(made.unread, 'recording')} could not be read")


def _write_files(transcriber: Transcriber, arguments: argparse.Namespace) -> None:
    """Write the transcript of each recording in a format, to a file of its own or to stdout."""
    from omni.inference.files import render_file
    from omni.storage.atomic import write_atomic

    failed = 0
    names = [as_path(name).stem for name in arguments.files]
    if arguments.out is not None and len(set(names)) < len(names):
        raise ConfigError("--out: recordings of the same name would share a file")
    for name, stem in zip(arguments.files, names, strict=True):
        try:
            text = render_file(transcriber, name, arguments.format, arguments.language)
        except ValueError as error:
            say(f"{public_uri(name)}: {error}", file=sys.stderr)
            failed += 1
            continue
        if arguments.out is None:
            print(text, end="", flush=True)
        else:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.out / f"{stem}.{arguments.format}", text.encode())
    if failed:
        raise RuntimeError(f"{counted(failed, 'recording')} could not be read")


def is_corpus(name: str) -> bool:
    """Tell whether an argument names a corpus rather than a recording or an index folder."""
    from omni.corpus.sources import KINDS

    kind, colon, _ = name.partition(":")
    if colon and kind in {*KINDS, "embedded"}:
        return True
    plain = name.removesuffix(".gz")
    return plain.endswith((".jsonl", ".csv", ".tsv", ".parquet", ".tar"))


def _is_folder(name: str) -> bool:
    with report_storage_errors(public_uri(name)):
        try:
            return as_path(name).is_dir()
        except StorageError as error:
            raise ConfigError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
