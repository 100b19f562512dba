"""Transcribe the rows of an index, or of a manifest, and score them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from omni.audio.decode import AudioError, decode_blocks
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.index import build_index, notes_of, read_index_folder
from omni.corpus.index_row import (
    DEFAULT_TASK,
    IndexRow,
    Recording,
    is_transcription,
    recordings,
    span_of,
)
from omni.corpus.manifest import ManifestError, manifest_path
from omni.corpus.messages import messages_of
from omni.corpus.tasks import expand_tasks, names_of_tasks
from omni.corpus.text import apply_policy
from omni.errors import ConfigError
from omni.inference.closed_rows import score_closed
from omni.inference.decode_batch import location_of, transcript_row
from omni.inference.features import Read, audio_of, cached_reader, open_cache
from omni.inference.pieces import cut_at_pauses, fit_blocks, is_long
from omni.inference.scores import summarize
from omni.inference.transcriber import ENCODE_BATCH, Request, Transcriber, Transcript
from omni.metrics.right_answers import pairs_of_tasks
from omni.metrics.task_scores import Scoring
from omni.metrics.text_metric import TextMetric
from omni.storage.http import DEFAULT_LIMITS, DownloadLimits
from omni.storage.uri import public_uri, reason_of
from omni.stream.feature_cache import FeatureCache

Run: TypeAlias = "Callable[[pa.Table], Iterable[tuple[IndexRow, Transcript | ValueError]]]"

_TEMPORARY_BYTES = 4 << 30
"""Most bytes of features on disk for one evaluation: of 30 hours, in bf16."""


def evaluate(
    transcriber: Transcriber,
    manifest: str,
    *,
    allow_absolute: bool = False,
    downloads: DownloadLimits = DEFAULT_LIMITS,
    metrics: Sequence[TextMetric] = (),
    run: Run | None = None,
    cache: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score a manifest, and return the summary and one transcript row per utterance.

    run: transcribes the rows of the index; None: `transcribe_rows`, in this process. cache: folder
    or URI of features to use and fill; without one, a corpus with closed tasks has one of its own,
    so that no recording is encoded again for another task or for its choices.
    Rows keep their counts of edits; `without_counts` removes them. Every task of the training that
    applies is asked, and error rates are about the answers that are what is said. Recordings that
    cannot be read are counted as rejects and left out of the error rates. Raises ConfigError when
    the manifest cannot be used, RuntimeError when storage does not answer.
    """
    try:
        index = build_index(
            [manifest],
            prompt=transcriber.prompt,
            allow_absolute=allow_absolute,
            downloads=downloads,
            keep=transcriber.keep,
        )
        index = apply_policy(index, transcriber.policy)
        index = expand_tasks(index, transcriber.tasks, "it", form=transcriber.policy.form)
    except ValueError as error:
        raise ConfigError(f"--data: {error}") from None
    except OSError as error:
        # Storage may answer later, so the config is not to blame.
        raise RuntimeError(f"--data: {reason_of(error)}") from error
    scoring = Scoring(transcriber.tasks, names_of_tasks(index.table))
    rows: list[dict[str, Any]] = []
    rejects = Counter(reject.reason for reject in index.rejects)
    whole = 0  # long conversations
    with _cache(transcriber, cache, run is None and scoring.scores_choices) as features:
        read = None
        if features is not None and run is None:
            cut = partial(_long_pieces, transcriber)
            read = cached_reader(transcriber, index.table, features, cut)
        table = index.table
        pairs = transcribe_rows(transcriber, table, read=read) if run is None else run(table)
        for row, found in pairs:
            if isinstance(found, ValueError):
                rejects[found.reason if isinstance(found, AudioError) else str(found)] += 1
                continue
            language = row["language"] or "en"
            location = location_of(row["uri"], span_of(row))
            scored = transcript_row(row["id"], location, row["text"], language, found)
            scored |= {name: row[name] for name in ("speaker", "task") if row[name] is not None}
            scored = scoring.label(scored, row["task"] or DEFAULT_TASK)
            rows.append(scored | ({"pieces": found.pieces} if found.pieces > 1 else {}))
            whole += row["messages"] is not None and has_long(row, transcriber.longest_piece)
        score_closed(transcriber, index.table, rows, scoring, features)
    summary = {
        "manifest": public_uri(manifest),
        "decoding": str(transcriber.decoding),
        **summarize(rows, metrics),
        **({"tasks": scores} if (scores := scoring.score(rows)) else {}),
        **({"pairs_of_tasks": both} if (both := pairs_of_tasks(rows)) else {}),
        **({"long_conversations": whole} if whole else {}),
        "rejects": dict(rejects),
        **({"notes": notes} if (notes := notes_of(index)) else {}),
    }
    return summary, rows


@contextmanager
def _cache(
    transcriber: Transcriber, location: str | None, wanted: bool
) -> Iterator[FeatureCache | None]:
    """Open the cache at `location`, or else, if one is wanted, one that is removed afterwards."""
    kept = open_cache(transcriber, location)
    with ExitStack() as stack:
        if kept is None and wanted:
            folder = stack.enter_context(TemporaryDirectory(prefix="omni-features-"))
            kept = FeatureCache(folder, limit_bytes=_TEMPORARY_BYTES)
        if kept is not None:
            stack.callback(kept.flush)
        yield kept


def transcribe_index(
    transcriber: Transcriber, folder: str, language: str | None = None
) -> Iterator[dict[str, Any]]:
    """Transcribe each row of an index that jobs.index wrote, whether or not it has a text yet.

    Yields the fields of a manifest line, with "cut" where the text is incomplete, and "error" in
    place of "text" where the recording cannot be read. Raises ConfigError when the folder holds no
    index.
    """
    transcriber.check_language(language)
    try:
        table, _ = read_index_folder(manifest_path(folder).parent, transcriber.prompt)
    except ManifestError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise RuntimeError(f"{public_uri(folder)}: {reason_of(error)}") from error
    for row, found in transcribe_rows(transcriber, table, tagger(transcriber, language)):
        result = {"error": str(found)} if isinstance(found, ValueError) else found.fields
        yield {**manifest_fields(row), **result}


def tagger(transcriber: Transcriber, language: str | None) -> Callable[[IndexRow, str], str]:
    """Return what puts the language into the prompts of rows, where the model has learnt tags."""
    policy = transcriber.policy
    return lambda row, prompt: policy.prompt(prompt, language or row["language"] or policy.language)


def transcribe_rows(
    transcriber: Transcriber,
    table: pa.Table,
    change_prompt: Callable[[IndexRow, str], str] | None = None,
    read: Read | None = None,
) -> Iterator[tuple[IndexRow, Transcript | ValueError]]:
    """Transcribe the rows of an index in order; yield each with its transcript, or its error.

    A long recording is cut into pieces; those of a conversation are not, since its answer is about
    the whole. change_prompt: returns the prompt of a row, and may raise ValueError. read: reads the
    recordings of a row, and is called for every one in order; None: `pieces_of`.
    Raises RuntimeError when storage stays unavailable.
    """
    waiting: deque[IndexRow] = deque()
    prompts = transcriber.policy.prompts

    def requests() -> Iterator[Request]:
        for batch in table.to_batches(max_chunksize=ENCODE_BATCH):
            rows: list[IndexRow] = batch.to_pylist()
            for row in rows:
                waiting.append(row)
                pieces = pieces_of(transcriber, row) if read is None else read(row)
                prompt = row["prompt"] or prompts.get(row["task"] or DEFAULT_TASK, "")
                try:
                    row["prompt"] = change_prompt(row, prompt) if change_prompt else prompt
                except ValueError as error:
                    yield Request(row["id"], (), _failed(error))
                    continue
                name = f"{row['id']} ({row['uri']})"
                yield Request(name, messages_of(row), pieces, is_transcription(row), row["id"])

    for found in transcriber.answers(requests()):
        yield waiting.popleft(), found


def _failed(error: ValueError) -> Iterator[list[np.ndarray]]:
    raise error
    yield []


def pieces_of(transcriber: Transcriber, row: IndexRow) -> Iterator[Sequence[np.ndarray]]:
    """Decode the recordings of a row; one that is long in blocks."""
    cut = _long_pieces(transcriber, row)
    if cut is not None:
        yield from cut
        return
    yield [audio_of(r["uri"], span_of(r), r["samples"]) for r in recordings(row)]


def _long_pieces(transcriber: Transcriber, row: IndexRow) -> Iterator[Sequence[np.ndarray]] | None:
    """Cut the recording of a row that is long; None for any other row."""
    if row["messages"] is not None or not has_long(row, transcriber.longest_piece):
        return None
    blocks = fit_blocks(_decode_blocks(row), row["samples"])
    return ([piece] for piece in cut_at_pauses(blocks, transcriber.longest_piece))


def has_long(row: IndexRow, longest_piece: float) -> bool:
    """Tell whether a recording of a row is cut into pieces of at most so many seconds."""
    return any(is_long(r["samples"], longest_piece) for r in recordings(row))


def _decode_blocks(recording: Recording) -> Iterator[np.ndarray]:
    uri = recording["uri"]
    try:
        yield from decode_blocks(uri, span=span_of(recording))
    except OSError as error:
        raise RuntimeError(f"{uri}: {reason_of(error)}") from error


def manifest_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest fields of an index row: id, audio, its span, language and speaker."""
    fields = {"id": row["id"], "audio": row["uri"]}
    if row["start"] or row["duration"] is not None:
        duration = row["duration"]
        fields["offset"] = row["start"]
        fields["duration"] = row["samples"] / SAMPLING_RATE if duration is None else duration
    return {**fields, **{k: row[k] for k in ("language", "speaker") if row[k] is not None}}
