"""Rows of the index as sequences of ids: how long they are, and what a teacher reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from omni.audio.logmel import SAMPLING_RATE, encoder_frames
from omni.config import Config
from omni.corpus.index import Index
from omni.corpus.index_row import IndexRow, recordings, transcripts
from omni.corpus.lengths import Reject
from omni.corpus.messages import messages_of
from omni.corpus.text import DEFAULT_TASK
from omni.errors import ConfigError
from omni.model.chat_template import AUDIO, Template
from omni.model.projector import soft_tokens

_BATCH = 65_536
_TOKENS = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("heard", pa.list_(pa.list_(pa.int32()))),
        ("task_number", pa.int32()),
    ]
)


def task_names(config: Config, indexes: dict[str, Index]) -> list[str]:
    """Names of the tasks, sorted. Raises ConfigError where a row has one that is not known."""
    found: dict[str, str] = {}
    for name, index in indexes.items():
        for task in index.table["task"].unique().to_pylist():
            found.setdefault(task or DEFAULT_TASK, name)
    known = config.data.tasks
    for task, split in found.items():
        if known and task not in known:
            raise ConfigError(
                f"data.tasks: data.{split} has rows of the task {task!r}; expected one of: "
                f"{', '.join(known)}"
            )
    return sorted(known or found)


def with_tokens(
    index: Index, template: Template, tasks: list[str], config: Config
) -> tuple[pa.Table, np.ndarray, list[Reject]]:
    """The index with token ids, positions per utterance (0: does not fit a bin), and rejects."""
    lengths = np.zeros(len(index), dtype=np.int64)
    rejects: list[Reject] = []
    made: list[pa.Table] = []
    first = 0
    for batch in index.table.to_batches(max_chunksize=_BATCH):  # as Python objects it is tenfold
        rows: list[IndexRow] = batch.to_pylist()
        names = [row["task"] or DEFAULT_TASK for row in rows]
        for row, task in zip(rows, names, strict=True):
            if not row["prompt"] and task in config.data.tasks:
                row["prompt"] = config.data.tasks[task].prompt
        rendered = template.render([messages_of(row) for row in rows])
        capacity = config.optim.bin_positions
        for i, (row, sequence) in enumerate(zip(rows, rendered, strict=True), start=first):
            frames = [encoder_frames(r["samples"], config.encoder.mode) for r in recordings(row)]
            need = sequence_positions(frames, len(sequence.ids), config.model.stack)
            if need <= capacity:
                lengths[i] = need
                continue
            rejects.append(
                Reject(
                    row["id"],
                    row["uri"],
                    "longer than a bin",
                    f"{need} positions ({row['samples'] / SAMPLING_RATE:.1f} s, "
                    f"{len(sequence.ids)} tokens); optim.bin_positions is {capacity}",
                )
            )
        first += len(rows)
        columns = {
            "tokens": [r.ids for r in rendered],
            "supervised": [r.supervised for r in rendered],
            "heard": _heard(rows, template) if config.optim.kl_weight else [None] * len(rows),
            "task_number": [tasks.index(name) for name in names],
        }
        made.append(pa.table(columns, schema=_TOKENS))
    joined = pa.concat_tables([_TOKENS.empty_table(), *made]).combine_chunks()
    table = index.table
    for name in _TOKENS.names:
        table = table.append_column(name, joined[name])
    return table, lengths, rejects


def beyond_ctc(table: pa.Table, lengths: np.ndarray) -> int:
    """How many utterances of the plan have more tokens to learn than soft tokens: CTC, which puts
    one on each at most, learns nothing from them.
    """
    tokens = _counted(table["tokens"])
    audio = _counted(table["tokens"], AUDIO)
    soft = lengths - (tokens - audio - 1)
    return int(((lengths > 0) & (_counted(table["supervised"], True) - 1 > soft)).sum())


def _counted(column: pa.ChunkedArray, value: int | None = None) -> np.ndarray:
    """(n,) how many elements each list has, or how many of them are `value`."""
    counts = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        if value is None:
            counts.append(np.diff(offsets))
            continue
        # As often as it stands before each list's end, less before its start.
        held = chunk.values.to_numpy(zero_copy_only=False) == value
        before = np.concatenate(([0], np.cumsum(held)))
        counts.append(np.diff(before[offsets]))
    return np.concatenate(counts)


def _heard(rows: list[IndexRow], template: Template) -> list[list[list[int]]]:
    """Ids of what is said in each recording of each row: what the teacher reads.

    Raises ConfigError where a recording of a conversation has no transcript.
    """
    encode = template.tokenizer.encode_batch
    heard = []
    for row in rows:
        texts = [text for text in transcripts(row) if text is not None]
        if len(texts) < len(recordings(row)):
            raise ConfigError(
                f"optim.kl_weight: {row['id']}: distillation reads what is said, and a recording "
                'has no transcript; expected {"audio": ..., "text": ...} in its message'
            )
        heard.append(encode(texts))
    return heard


def sequence_positions(frames: Sequence[int], ids: int, stack: int) -> int:
    """Positions an utterance takes in a bin: `ids` ids, one for each of its recordings, which have
    so many frames. The last id is a target, not an input.
    """
    return sum(soft_tokens(count, stack) for count in frames) + ids - len(frames) - 1
