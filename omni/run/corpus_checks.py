"""Check the training corpus of a run, whatever its size: rejects, CTC, held-out sentences."""

from __future__ import annotations

from collections.abc import Sequence

from omni.config import Config
from omni.corpus.index_row import DEFAULT_TASK
from omni.corpus.rejects import Reject
from omni.errors import ConfigError


def check_rejects(config: Config, rejects: Sequence[Reject], rows: int) -> None:
    """Raise ConfigError if more of so many rows of data.train are rejected than is allowed."""
    if len(rejects) > config.data.max_rejects * rows:
        worst = rejects[0]
        raise ConfigError(
            f"data.max_rejects: {len(rejects)} of {rows} rows of data.train cannot be used, more "
            f"than {config.data.max_rejects:.0%}; the first, {worst.id}: {worst.reason}: "
            f"{worst.detail}"
        )


def ctc_notes(silent: int, beyond: int, usable: int, rows: int, sped: bool) -> list[str]:
    """Say how many utterances CTC learns nothing from. Raises ConfigError if it is all of them.

    silent, beyond: see `ctc_fit`; of so many rows, of which so many are usable. sped: the
    utterances are at their fastest.
    """
    if silent == usable:
        raise ConfigError(
            "optim.ctc_weight: no row of data.train has a transcript: rows of other tasks than "
            f'{DEFAULT_TASK} and conversations need messages with {{"audio": ..., "text": ...}}'
        )
    of = f"of {rows} utterances"
    notes = []
    if silent:
        notes.append(
            f"CTC learns nothing from {silent} {of}: what is said in them is not known, since they "
            "answer another task, or their messages have no transcripts"
        )
    if beyond:
        fast = " at their fastest" if sped else ""
        notes.append(
            f"CTC learns nothing from {beyond} {of}{fast}: they have more tokens than soft tokens "
            "(model.stack)"
        )
    return notes


def overlap_notes(name: str, known: int, rows: int) -> list[str]:
    """Say how many sentences of a held-out split occur in training, where a WER says little."""
    if not known:
        return []
    return [f"{known} of {rows} {name} sentences also occur in training, so its WER is too low"]
