"""Row types of the index, as `pyarrow.Table.to_pylist` returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


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


def recordings(row: IndexRow) -> Sequence[Recording]:
    """Return the recordings of an index row: those of its conversation, or the row itself."""
    return row["audios"] or [row]


def transcripts(row: IndexRow) -> list[str | None]:
    """Return the transcript of each recording of an index row."""
    return [part["text"] for part in row["audios"]] if row["audios"] else [row["text"]]
