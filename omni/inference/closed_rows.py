"""Score the choices of a corpus's closed tasks with the model of a checkpoint."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from omni.audio.decode import AudioError
from omni.corpus.index_row import IndexRow, recordings
from omni.corpus.messages import messages_of
from omni.inference.choices import add_choice_scores
from omni.inference.features import features_of
from omni.inference.transcriber import Transcriber
from omni.metrics.task_scores import Scoring
from omni.stream.collate import Utterance
from omni.stream.feature_cache import FeatureCache

_ROWS = 64
"""Rows whose recordings are in memory at a time, and exchange them."""


def score_closed(
    transcriber: Transcriber,
    table: pa.Table,
    rows: list[dict[str, Any]],
    scoring: Scoring,
    cache: FeatureCache | None = None,
) -> None:
    """Add the scores of the choices to the transcript rows of closed tasks, see `Scoring`.

    Features come from the cache; what it lacks is read and encoded, once for all tasks that follow
    each other. Raises RuntimeError for a recording that can no longer be read.
    """
    if not scoring.scores_choices:
        return
    of_id = {row["id"]: row for row in rows}
    closed = scoring.closed
    tasks = pa.array([name for name in closed if name in scoring.names], pa.large_string())
    table = table.filter(pc.is_in(table["task"], tasks))
    known: dict[str, Tensor] = {}  # of this batch and the last one
    for batch in table.to_batches(max_chunksize=_ROWS):
        asked: list[IndexRow] = [row for row in batch.to_pylist() if row["id"] in of_id]
        every = [recording for row in asked for recording in recordings(row)]
        new = [recording for recording in every if recording["key"] not in known]
        features = {r["key"]: known[r["key"]] for r in every if r["key"] in known}
        read = features_of(transcriber, new, cache)
        for recording in new:
            found = read[recording["key"]]
            if isinstance(found, AudioError):
                raise RuntimeError(f"{recording['uri']}: {found}")
            features[recording["key"]] = found
        known = features
        with transcriber.autocast():
            add_choice_scores(
                [of_id[row["id"]] for row in asked],
                [_utterance(transcriber, row, features) for row in asked],
                [row["key"] for row in asked],
                closed,
                transcriber.model,
                transcriber.template,
            )


def _utterance(transcriber: Transcriber, row: IndexRow, features: dict[str, Tensor]) -> Utterance:
    prompts = transcriber.policy.prompts
    asked: IndexRow = {**row, "prompt": row["prompt"] or prompts.get(row["task"] or "", "")}
    prompt = transcriber.template.prompt(messages_of(asked))
    heard = [features[recording["key"]] for recording in recordings(row)]
    return Utterance(heard, prompt, [False] * len(prompt))
