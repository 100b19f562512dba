"""Measure WER and CER of checkpoints on corpora, with intervals and paired tests.

Texts are compared after Whisper's normaliser. It prints JSON: the figures of one checkpoint on one
corpus, or {"results", "differences"} of several; differences are to the first checkpoint, and
"task_differences" those of the right answers of each task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli import (
    job_parser,
    json_text,
    location,
    positive,
    run_job,
    say,
)
from jobs.corpus_arguments import add_corpus_limits, corpus_spec, download_limits
from jobs.decoding_arguments import (
    CHECKPOINT,
    add_actors,
    add_decoding,
    add_sampling,
    decoding_options,
)
from omni.errors import ConfigError

if TYPE_CHECKING:
    from omni.inference.rows import Run
    from omni.model.decode import DecodingOptions


def main(argv: list[str] | None = None) -> int:
    parser = job_parser("evaluate", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        action="append",
        required=True,
        help=f"{CHECKPOINT}; may be repeated",
    )
    add(
        "--data",
        type=corpus_spec,
        action="append",
        required=True,
        help="corpus (any SPEC of omni index), or embedded:test; may be repeated",
    )
    add_corpus_limits(parser)
    add(
        "--metric",
        metavar="MODULE:CLASS",
        action="append",
        default=[],
        help="metric of your own beside WER and CER (docs/plug-ins.md); may be repeated",
    )
    add_actors(parser)
    add(
        "--shards",
        metavar="DIR",
        type=location,
        help="folder of finished shards, with which the same command continues; see --actors",
    )
    add("--out", type=Path, help="write one JSON line per utterance here")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="write tables here: .md, or .html with the worst utterances to hear",
    )
    add("--worst", type=positive, default=50, help="utterances on the page (default 50)")
    add("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    add_decoding(parser)
    add_sampling(parser)
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    return run_job(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from omni.checkpoint.base import checkpoint_folder
    from omni.inference.decode_batch import without_counts
    from omni.inference.rows import evaluate
    from omni.inference.scores import compare, worst
    from omni.inference.transcriber import Transcriber
    from omni.metrics.right_answers import compare_tasks
    from omni.metrics.run_files import append_json
    from omni.metrics.task_scores import spoken
    from omni.metrics.text_metric import load_metrics
    from omni.report.score_page import Scores, markdown, page
    from omni.storage.uri import public_uri

    torch.set_num_threads(arguments.threads)
    options = decoding_options(arguments)
    metrics = load_metrics(arguments.metric, "--metric")
    names, corpora = _distinct(arguments, "checkpoint"), _distinct(arguments, "data")
    paths = {name: checkpoint_folder(name) for name in names}
    if arguments.table is not None and arguments.table.suffix not in (".md", ".html"):
        raise ConfigError(f"--table: expected a name in .md or .html, got {str(arguments.table)!r}")
    for option, file in (("table", arguments.table), ("out", arguments.out)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"--{option}: {file.parent}: no such folder")
    results: list[dict[str, Any]] = []
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if arguments.actors and arguments.shards is None:
        raise ConfigError("--actors: expected --shards DIR, a folder that all processes see")
    for name, path in paths.items():
        device = "cpu" if arguments.actors else arguments.device
        transcriber = Transcriber.load(path, device, options)
        for corpus in corpora:
            summary, scored = evaluate(
                transcriber,
                corpus,
                allow_absolute=arguments.allow_absolute,
                downloads=download_limits(arguments),
                metrics=metrics,
                run=_run(arguments, str(path), options),
                cache=arguments.cache,
            )
            results.append({"checkpoint": public_uri(name), **summary})
            of = {"checkpoint": public_uri(name), "corpus": summary["manifest"]}
            rows[name, corpus] = [{**of, **row} for row in scored]
            if arguments.out is not None:
                if len(results) == 1:  # What was there before is replaced by results only.
                    arguments.out.unlink(missing_ok=True)
                append_json(arguments.out, [without_counts(row) for row in rows[name, corpus]])
    first, *others = names
    differences, task_differences = [], []
    for corpus in corpora:
        for other in others:
            ours, theirs = rows[first, corpus], rows[other, corpus]
            of = {
                "manifest": public_uri(corpus),
                "first": public_uri(first),
                "second": public_uri(other),
            }
            if (found := compare(spoken(ours), spoken(theirs))) is not None:
                differences.append({**of, **found})
            for task, test in compare_tasks(ours, theirs).items():
                task_differences.append({**of, "task": task, **test})
    every = [row for of_one in rows.values() for row in of_one]
    scores = Scores(results, differences, task_differences, worst(spoken(every), arguments.worst))
    single = len(results) == 1
    print(json_text(results[0] if single else scores.to_dict(), indent=1))
    if arguments.table is not None:
        write = page if arguments.table.suffix == ".html" else markdown
        arguments.table.write_text(write(scores))


def _run(arguments: argparse.Namespace, checkpoint: str, options: DecodingOptions) -> Run | None:
    """Return what transcribes an index in shards; None for this process without shards."""
    from omni.inference.pipeline import Actors, transcribe_corpus
    from omni.inference.shards import Decoder

    if arguments.shards is None:
        return None
    decoder = Decoder(
        checkpoint,
        arguments.device,
        arguments.threads,
        options,
        cache=arguments.cache,
        tag=False,
    )
    actors = Actors(arguments.actors, arguments.gpus) if arguments.actors else None

    def progress(line: str) -> None:
        say(f"  {line}", file=sys.stderr)

    return lambda table: transcribe_corpus(decoder, table, arguments.shards, actors, progress)


def _distinct(arguments: argparse.Namespace, name: str) -> list[str]:
    given: list[str] = getattr(arguments, name)
    if len(set(given)) < len(given):
        raise ConfigError(f"--{name}: given twice: {', '.join(given)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
