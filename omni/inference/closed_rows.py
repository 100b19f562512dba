"""Score the choices of a corpus's closed tasks with the model of a checkpoint."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from omni.audio.decode import decode_with_retry, fit
from omni.corpus.index_row import IndexRow, Recording, recordings, span_of
from omni.corpus.messages import messages_of
from omni.inference.choices import add_choice_scores
from omni.inference.transcriber import Transcriber
from omni.metrics.task_scores import Scoring
from omni.stream.collate import Utterance

_ROWS = 64
"""Rows whose recordings are in memory at a time, and exchange them."""


def score_closed(
    transcriber: Transcriber, table: pa.Table, rows: list[dict[str, Any]], scoring: Scoring
) -> None:
    """Add the scores of the choices to the transcript rows of closed tasks, see `Scoring`.

    Their recordings are read and encoded once more, each once for all tasks that follow each other.
    """
    of_id = {row["id"]: row for row in rows}
    closed = scoring.closed
    tasks = pa.array([name for name in closed if name in scoring.names], pa.large_string())
    if not scoring.named or not len(tasks):
        return
    table = table.filter(pc.is_in(table["task"], tasks))
    known: dict[str, Tensor] = {}  # of this batch and the last one
    for batch in table.to_batches(max_chunksize=_ROWS):
        asked: list[IndexRow] = [row for row in batch.to_pylist() if row["id"] in of_id]
        features: dict[str, Tensor] = {}
        for row in asked:
            for recording in recordings(row):
                key = recording["key"]
                if key not in features:
                    found = known.get(key)
                    features[key] = _encode(transcriber, recording) if found is None else found
        known = features
        with torch.autocast(
            transcriber.encoder.device.type, torch.bfloat16, enabled=transcriber.bf16
        ):
            add_choice_scores(
                [of_id[row["id"]] for row in asked],
                [_utterance(transcriber, row, features) for row in asked],
                [row["key"] for row in asked],
                closed,
                transcriber.model,
                transcriber.template,
            )


def _encode(transcriber: Transcriber, recording: Recording) -> Tensor:
    audio = decode_with_retry(recording["uri"], span_of(recording), samples=recording["samples"])
    return transcriber.features_of(fit(audio, recording["samples"]))


def _utterance(transcriber: Transcriber, row: IndexRow, features: dict[str, Tensor]) -> Utterance:
    prompts = transcriber.policy.prompts
    asked: IndexRow = {**row, "prompt": row["prompt"] or prompts.get(row["task"] or "", "")}
    prompt = transcriber.template.prompt(messages_of(asked))
    heard = [features[recording["key"]] for recording in recordings(row)]
    return Utterance(heard, prompt, [False] * len(prompt))
