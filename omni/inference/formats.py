"""Formats of transcripts: text, SubRip, WebVTT and OpenAI's verbose JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from omni.corpus.text import join

Format = Literal["json", "text", "srt", "vtt", "verbose_json"]
FORMATS: tuple[Format, ...] = get_args(Format)
TIMED = ("srt", "vtt", "verbose_json")
"""Formats that need the times of what is said."""
MEDIA = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


@dataclass(frozen=True)
class Span:
    """Hold the text of `duration` seconds from `start` on. cut: its end is missing."""

    start: float
    duration: float
    text: str
    cut: bool = False


def whole_text(spans: Sequence[Span]) -> str:
    return join([span.text for span in spans if span.text])


def render(
    spans: Sequence[Span], wanted: Format, language: str, seconds: float
) -> str | dict[str, Any]:
    """Write spans in a format: a text, or an object to be sent as JSON.

    seconds: length of the recording. Spans in which nothing was written are left out.
    """
    spans = [span for span in spans if span.text]
    text = whole_text(spans)
    if wanted == "json":
        return {"text": text, **_cut(spans)}
    if wanted == "text":
        return text + "\n"
    if wanted == "srt":
        return "".join(
            f"{number}\n{_range(span, ',')}\n{_line(span.text)}\n\n"
            for number, span in enumerate(spans, start=1)
        )
    if wanted == "vtt":
        cues = "".join(f"{_range(span, '.')}\n{_escaped(_line(span.text))}\n\n" for span in spans)
        return f"WEBVTT\n\n{cues}"
    return {
        "task": "transcribe",
        "language": language,
        "duration": seconds,
        "text": text,
        "segments": [
            {
                "id": number,
                "start": span.start,
                "end": round(span.start + span.duration, 6),
                "text": span.text,
                **_cut([span]),
            }
            for number, span in enumerate(spans)
        ],
        **_cut(spans),
    }


def _cut(spans: Sequence[Span]) -> dict[str, bool]:
    """Say that a text is incomplete: a field of ours, which OpenAI's clients pass on."""
    return {"cut": True} if any(span.cut for span in spans) else {}


def _range(span: Span, point: str) -> str:
    return f"{_clock(span.start, point)} --> {_clock(span.start + span.duration, point)}"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{point}{milliseconds:03}"


def _line(text: str) -> str:
    """Fold a text into one line: an empty line would end its cue."""
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
