"""Cut long recordings without a transcript into rows, by voice activity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from omni.audio.decode import AudioError, measure
from omni.audio.vad import Segmenting, speech_spans
from omni.audio.windows import SAMPLING_RATE
from omni.corpus.index_row import span_of
from omni.corpus.sources.base import Row

_UTTERANCE_SECONDS = 30.0
"""A recording with one text is an utterance up to this length, when the text is written anew."""


def cut_rows(rows: Iterable[Row], how: Segmenting, rewrite_texts: bool = False) -> Iterator[Row]:
    """Yield the rows, with one row per span of speech instead of a long recording without text.

    The id of a span is its recording's id with start and end in milliseconds. Long recordings whose
    text has no times, and those without speech, become errors. rewrite_texts: those texts are not
    needed: a recording of up to 30 s with one stays whole, and a longer one is cut.
    """
    for row in rows:
        if row.error is not None or row.audios is not None:
            yield row
            continue
        try:
            yield from _cut(row, how, rewrite_texts)
        except AudioError as error:
            yield replace(row, error=(error.reason, error.detail))


def _cut(row: Row, how: Segmenting, rewrite_texts: bool) -> list[Row]:
    """Cut one recording. Raises AudioError."""
    data, span = row.uri if row.data is None else row.data, span_of(vars(row))
    seconds = measure(data, span) / SAMPLING_RATE
    timed = row.duration is not None or span.start > 0
    if seconds <= how.longest or (row.text and timed):
        return [row]
    name = row.uri or row.id
    if row.text and rewrite_texts:
        if seconds <= _UTTERANCE_SECONDS:
            return [row]
        row = replace(row, text="")
    if row.text:
        raise AudioError(
            "needs segments",
            f"{name}: {seconds:.1f} s with one text: expected times of its utterances (offset and "
            f"duration), no text, or {how.longest:g} s at most (--longest_seconds)",
        )
    spans = speech_spans(data, how, span)
    if not spans:
        raise AudioError("no speech", f"{name}: no speech found in {seconds:.1f} s")
    return [
        replace(
            row,
            id=_span_id(row.id, start, start + duration),
            start=start,
            duration=duration,
            stated_duration=None,
        )
        for start, duration in spans
    ]


def _span_id(recording: str, start: float, end: float) -> str:
    return f"{recording}-{round(1000 * start):08}-{round(1000 * end):08}"
