"""Row types of the index, as `pyarrow.Table.to_pylist` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from omni.audio.decode import AudioSpan

DEFAULT_TASK = "transcribe"
"""Task of rows without one."""


class Recording(TypedDict):
    """Location, span and measurements of one recording."""

    uri: str
    offset: int | None
    """First byte of the recording in an archive; None: the whole file."""
    length: int | None
    """Bytes of the recording in an archive."""
    start: float
    """Seconds from the beginning of the file."""
    duration: float | None
    """Seconds; None: to the end of the file."""
    samples: int
    """Samples at 16 kHz, from the header."""
    key: str
    """Content hash, which names the recording's features in the cache."""


class MessageRecording(Recording):
    """One recording of a conversation."""

    text: str | None


class IndexRow(Recording):
    """One utterance. Of a conversation, `samples` is the sum over its recordings, `key` identifies
    all of them, and `text` is the last answer."""

    id: str
    text: str
    prompt: str
    language: str | None
    speaker: str | None
    task: str | None
    messages: str | None
    """JSON of a conversation, see `omni.corpus.messages`; None: one recording and its text."""
    audios: list[MessageRecording] | None
    """Recordings of a conversation, in order; None: the row itself is the recording."""
    labels: str | None
    """JSON object of kept columns, see `omni.corpus.labels.labels_of`; None: there are none."""


def recordings(row: IndexRow) -> Sequence[Recording]:
    """Return the recordings of an index row: those of its conversation, or the row itself."""
    return row["audios"] or [row]


def is_transcription(row: IndexRow) -> bool:
    """Tell whether the answer of an index row is what is said in its one recording."""
    return row["messages"] is None and row["task"] in (None, DEFAULT_TASK)


def transcripts(row: IndexRow) -> list[str | None]:
    """Return what is said in each recording of an index row; None where it is not known.

    The answers of other tasks than transcription, and those of a conversation, are not said.
    """
    if row["audios"]:
        return [part["text"] for part in row["audios"]]
    return [row["text"] if is_transcription(row) else None]


def span_of(row: Mapping[str, Any]) -> AudioSpan:
    """Return the span of the file that an index row stands for."""
    inside = None if row["length"] is None else (row["offset"], row["length"])
    return AudioSpan(row["start"], row["duration"], inside)
