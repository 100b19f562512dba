"""Recordings without a text, cut by voice activity into rows of the index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from omni.audio.decode import AudioError, measure
from omni.audio.logmel import SAMPLING_RATE
from omni.audio.vad import Segmenting, speech_spans
from omni.corpus.lengths import span_of
from omni.corpus.sources.base import Row


def cut_rows(rows: Iterable[Row], how: Segmenting) -> Iterator[Row]:
    """The rows, and in place of a long recording without a text one for each span of speech.

    A span's id is that of its recording with its start and end in milliseconds. Long recordings
    whose text has no times, and those in which nobody speaks, become errors.
    """
    for row in rows:
        if row.error is not None or row.audios is not None:
            yield row
            continue
        try:
            yield from _cut(row, how)
        except AudioError as error:
            yield replace(row, error=(error.reason, error.detail))


def _cut(row: Row, how: Segmenting) -> list[Row]:
    """Raises AudioError."""
    data, within = row.uri if row.data is None else row.data, span_of(vars(row))
    seconds = measure(data, within) / SAMPLING_RATE
    timed = row.duration is not None or within.start > 0
    if seconds <= how.longest or (row.text and timed):
        return [row]
    place = row.uri or row.id
    if row.text:
        raise AudioError(
            "needs segments",
            f"{place}: {seconds:.1f} s with one text: expected times of its utterances (offset and "
            f"duration), no text, or {how.longest:g} s at most (--longest_seconds)",
        )
    spans = speech_spans(data, how, within)
    if not spans:
        raise AudioError("no speech", f"{place}: nobody speaks in its {seconds:.1f} s")
    return [
        replace(row, id=_name(row.id, start, start + duration), start=start, duration=duration)
        for start, duration in spans
    ]


def _name(recording: str, start: float, end: float) -> str:
    return f"{recording}-{round(1000 * start):08}-{round(1000 * end):08}"
