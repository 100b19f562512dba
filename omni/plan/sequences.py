"""Render rows of the index as token sequences, and count the positions they take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from omni.audio.windows import SAMPLING_RATE, encoder_frames
from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.index_row import DEFAULT_TASK, IndexRow, recordings, transcripts
from omni.corpus.messages import messages_of
from omni.corpus.rejects import Reject
from omni.errors import ConfigError
from omni.model.chat_template import AUDIO, RefusedRow, Template
from omni.model.projector import soft_tokens
from omni.storage.digest import digest

LONGER_THAN_A_BIN = "longer than a bin"
"""Reason of rows that are in the index and not in the plan."""
# Rows that are Python objects at a time: they take ten times the memory of the table.
_BATCH = 65_536
_TOKENS = pa.schema(
    [
        ("tokens", pa.large_list(pa.int32())),
        ("supervised", pa.large_list(pa.bool_())),
        ("transcript_tokens", pa.large_list(pa.large_list(pa.int32()))),
        ("task_number", pa.int32()),
    ]
)


class PlannedRow(IndexRow):
    """Index row with the columns that `with_tokens` adds."""

    tokens: list[int]
    """Token ids, with AUDIO in the place of each recording."""
    supervised: list[bool]
    transcript_tokens: list[list[int] | None] | None
    """Token ids of what is said in each recording, where it is known; None if no loss needs it."""
    task_number: int | None


def task_names(config: Config, indexes: dict[str, Index]) -> list[str]:
    """List the names of the tasks, sorted. Raises ConfigError for a row of an unknown task."""
    return check_tasks(config, tasks_by_split(indexes))


def tasks_by_split(indexes: dict[str, Index]) -> dict[str, set[str]]:
    """Return the names of the tasks in each index."""
    return {
        name: {task or DEFAULT_TASK for task in index.table["task"].unique().to_pylist()}
        for name, index in indexes.items()
    }


def check_tasks(config: Config, tasks: dict[str, set[str]]) -> list[str]:
    """List the names of the tasks of all splits, sorted. Raises ConfigError for an unknown one."""
    known = set(config.data.tasks)
    if any(task.answer for task in config.data.tasks.values()):
        known.add(DEFAULT_TASK)  # The rows themselves, which need no settings.
    for split, names in tasks.items():
        for task in sorted(names):
            if known and task not in known:
                raise ConfigError(
                    f"data.tasks: data.{split} has rows of the task {task!r}; expected one of: "
                    f"{', '.join(sorted(known))}"
                )
    return sorted(known or set().union(*tasks.values()))


def with_tokens(
    index: Index, template: Template, tasks: list[str], config: Config
) -> tuple[pa.Table, np.ndarray, list[Reject]]:
    """Add token ids to the index.

    Returns the table (rows are `PlannedRow`s), (n,) positions of each utterance, 0 where it does
    not fit a bin, and those utterances as rejects. Raises ConfigError naming a row that the
    template cannot render.
    """
    lengths = np.zeros(len(index), dtype=np.int64)
    rejects: list[Reject] = []
    batches: list[pa.Table] = []
    first = 0
    for batch in index.table.to_batches(max_chunksize=_BATCH):
        rows: list[IndexRow] = batch.to_pylist()
        names = [row["task"] or DEFAULT_TASK for row in rows]
        for row, task in zip(rows, names, strict=True):
            if not row["prompt"] and task in config.data.tasks:
                row["prompt"] = config.data.tasks[task].prompt
        try:
            rendered = template.render([messages_of(row) for row in rows])
        except RefusedRow as error:
            raise ConfigError(f"data.template: {rows[error.number]['id']}: {error}") from None
        capacity = config.optim.bin_positions
        for i, (row, sequence) in enumerate(zip(rows, rendered, strict=True), start=first):
            frames = [encoder_frames(r["samples"], config.encoder.mode) for r in recordings(row)]
            need = sequence_positions(
                frames, len(sequence.ids), config.model.stack, config.model.summary_tokens
            )
            if need <= capacity:
                lengths[i] = need
                continue
            seconds = row["samples"] / SAMPLING_RATE
            rejects.append(
                Reject(
                    row["id"],
                    row["uri"],
                    LONGER_THAN_A_BIN,
                    f"{need} positions ({seconds:.1f} s, {len(sequence.ids)} tokens); "
                    f"optim.bin_positions is {capacity}",
                )
            )
        first += len(rows)
        said = _transcript_tokens(rows, template, config)
        columns = {
            "tokens": [r.ids for r in rendered],
            "supervised": [r.supervised for r in rendered],
            "transcript_tokens": said,
            "task_number": [tasks.index(name) for name in names],
        }
        batches.append(pa.table(columns, schema=_TOKENS))
    joined = pa.concat_tables([_TOKENS.empty_table(), *batches]).combine_chunks()
    table = index.table
    for name in _TOKENS.names:
        table = table.append_column(name, joined[name])
    return table, lengths, rejects


def ctc_fit(table: pa.Table, lengths: np.ndarray, summary_tokens: int = 0) -> tuple[int, int]:
    """Count the utterances of the plan that CTC learns nothing from.

    Returns those without a transcript of any recording, and those with more tokens in it than soft
    tokens: CTC emits at most one token per soft token.
    """
    tokens = _list_counts(table["tokens"])
    audio = _list_counts(table["tokens"], AUDIO)
    soft = lengths - (tokens - audio - 1) - summary_tokens * audio
    said = _nested_counts(table["transcript_tokens"])
    planned = lengths > 0
    return int((planned & (said == 0)).sum()), int((planned & (said > soft)).sum())


def _nested_counts(column: pa.ChunkedArray) -> np.ndarray:
    """Count the elements of all lists inside each list of a column: (n,)."""
    counts = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        inner = chunk.values.offsets.to_numpy()
        counts.append(np.diff(inner[chunk.offsets.to_numpy()]))
    return np.concatenate(counts)


def token_fingerprint(table: pa.Table) -> str:
    """Hash the token ids of each utterance, and which of them are learnt."""
    parts = [_list_counts(table["tokens"])]
    for name in ("tokens", "supervised"):
        parts += [chunk.flatten().to_numpy(False) for chunk in table[name].chunks]
    return digest(*(part.tobytes() for part in parts))


def answer_lengths(table: pa.Table) -> np.ndarray:
    """Count the tokens of each utterance's last answer, its end token included: (n,)."""
    counts = [np.zeros(0, np.int64)]
    for chunk in table["supervised"].chunks:
        given = np.flatnonzero(~chunk.flatten().to_numpy(False))
        ends = np.cumsum(np.diff(chunk.offsets.to_numpy()))
        # Every utterance has an id that is given, at least that of its recording.
        counts.append(ends - 1 - given[np.searchsorted(given, ends) - 1])
    return np.concatenate(counts)


def _list_counts(column: pa.ChunkedArray, value: int | None = None) -> np.ndarray:
    """Count the elements of each list of a column, or those that equal `value`: (n,)."""
    counts = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        if value is None:
            counts.append(np.diff(offsets))
            continue
        equal = chunk.values.to_numpy(zero_copy_only=False) == value
        before = np.concatenate(([0], np.cumsum(equal)))
        counts.append(np.diff(before[offsets]))
    return np.concatenate(counts)


def _transcript_tokens(
    rows: Sequence[IndexRow], template: Template, config: Config
) -> list[list[list[int] | None] | None]:
    """Tokenize what is said in each recording of each row, where a loss needs it.

    Raises ConfigError for a recording without a transcript, with distillation.
    """
    optim = config.optim
    if not optim.kl_weight and not optim.ctc_weight:
        return [None] * len(rows)
    texts = [transcripts(row) for row in rows]
    for row, of_row in zip(rows, texts, strict=True):
        if optim.kl_weight and None in of_row:
            raise ConfigError(
                f"optim.kl_weight: {row['id']}: distillation needs the transcript of every "
                'recording; expected messages with {"audio": ..., "text": ...}'
            )
    known = list(dict.fromkeys(text for of_row in texts for text in of_row if text is not None))
    encoded = dict(zip(known, template.tokenizer.encode_batch(known), strict=True))
    return [[None if text is None else encoded[text] for text in of_row] for of_row in texts]


def sequence_positions(frames: Sequence[int], ids: int, stack: int, summary_tokens: int = 0) -> int:
    """Count the positions of an utterance in a bin.

    frames: encoder frames of each recording, which becomes soft tokens in the place of its AUDIO,
    after `summary_tokens` others. ids: token ids with those of the recordings. The last id is a
    target, not an input.
    """
    soft = sum(summary_tokens + soft_tokens(count, stack) for count in frames)
    return soft + ids - len(frames) - 1
