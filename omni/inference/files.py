"""Transcripts of single recordings as text, subtitles, or JSON with the times of each span."""

from __future__ import annotations

import json
from typing import Literal

from omni.audio.decode import AudioError, measure
from omni.audio.windows import SAMPLING_RATE
from omni.inference.formats import Format, Span, render
from omni.inference.spans import transcribe_speech
from omni.inference.transcriber import Transcriber
from omni.storage.path import as_path

FileFormat = Literal["txt", "srt", "vtt", "json"]
_NAMES: dict[FileFormat, Format] = {
    "txt": "text",
    "srt": "srt",
    "vtt": "vtt",
    "json": "verbose_json",
}


def render_file(
    transcriber: Transcriber, file: str, wanted: FileFormat, language: str | None = None
) -> str:
    """Transcribe the spans of speech of a recording, and write them in a format.

    Raises AudioError for a recording that cannot be read.
    """
    spans = []
    for row in transcribe_speech(transcriber, [file], language):
        if "error" in row:
            raise AudioError("unreadable", row["error"])
        spans.append(Span(row["offset"], row["duration"], row["text"], "cut" in row))
    seconds = measure(as_path(file)) / SAMPLING_RATE
    code = language or transcriber.policy.language or "en"
    found = render(spans, _NAMES[wanted], code, seconds)
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False) + "\n"
