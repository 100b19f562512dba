"""Transcribe the spans of speech that voice activity detection finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omni.audio.decode import AudioError, AudioSpan, decode
from omni.audio.vad import Segmenting, speech_spans
from omni.inference.transcriber import ENCODE_BATCH, Transcriber
from omni.storage.path import as_path
from omni.storage.uri import public_uri, reason_of


def transcribe_speech(
    transcriber: Transcriber, files: Sequence[str], language: str | None = None
) -> Iterator[dict[str, Any]]:
    """Transcribe each span of speech in each file, in order.

    Yields {"audio", "offset", "duration", "text"} per span, in seconds, with "cut" where the text
    is incomplete, or {"audio", "error"} for a file that cannot be read. Each file is read twice,
    first in blocks to find speech, then a few spans at a time. Raises ConfigError as
    `Transcriber.check_language`.
    """
    transcriber.check_language(language)
    segmenting = Segmenting(longest=transcriber.longest_piece)
    for file in files:
        path, file = as_path(file), public_uri(file)
        try:
            if isinstance(path, Path) and not path.is_file():
                raise AudioError("missing", f"no such file: {file}")
            spans = iter(speech_spans(path, segmenting))
            while group := list(islice(spans, ENCODE_BATCH)):
                pieces = [decode(path, AudioSpan(*span)) for span in group]
                requests = [
                    transcriber.request(file, [piece], language, draw=f"{start}")
                    for (start, _), piece in zip(group, pieces, strict=True)
                ]
                for (start, duration), found in zip(
                    group, transcriber.answers(requests), strict=True
                ):
                    if isinstance(found, ValueError):
                        raise found
                    yield {"audio": file, "offset": start, "duration": duration, **found.fields}
        except OSError as error:
            raise RuntimeError(f"{file}: {reason_of(error)}") from error
        except AudioError as error:
            yield {"audio": file, "error": str(error)}
