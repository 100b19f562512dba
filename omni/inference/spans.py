"""Transcribe spans of speech: those that voice activity detection finds, and an index's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omni.audio.decode import AudioError, AudioSpan, decode
from omni.audio.logmel import SAMPLING_RATE
from omni.audio.vad import Segmenting, speech_spans
from omni.corpus.index import read_index_folder
from omni.corpus.index_row import DEFAULT_TASK, IndexRow
from omni.corpus.manifest import ManifestError, manifest_path
from omni.errors import ConfigError
from omni.inference.transcriber import ENCODE_BATCH, Transcriber, hold
from omni.storage.path import as_path
from omni.storage.uri import public_uri, reason_of


def transcribe_speech(
    transcriber: Transcriber, files: Sequence[str], language: str | None = None
) -> Iterator[dict[str, Any]]:
    """Transcribe each span of speech in each file, in order.

    Yields {"audio", "offset", "duration", "text"} per span, in seconds, or {"audio", "error"} for a
    file that cannot be read. Each file is read twice, first in blocks to find speech, then a few
    spans at a time. Raises ConfigError as `Transcriber.check_language`.
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
                texts = transcriber.texts_of(pieces, language)
                for (start, duration), text in zip(group, texts, strict=True):
                    yield {"audio": file, "offset": start, "duration": duration, "text": text}
        except OSError as error:
            raise RuntimeError(f"{file}: {reason_of(error)}") from error
        except AudioError as error:
            yield {"audio": file, "error": str(error)}


def transcribe_index(
    transcriber: Transcriber, folder: str, language: str | None = None
) -> Iterator[dict[str, Any]]:
    """Transcribe each row of an index that jobs.index wrote, whether or not it has a text yet.

    Yields the fields of a manifest line, with "error" in place of "text" where the recording cannot
    be read. Raises ConfigError when the folder holds no index.
    """
    transcriber.check_language(language)
    try:
        table, _ = read_index_folder(manifest_path(folder).parent, transcriber.prompt)
    except ManifestError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise RuntimeError(f"{public_uri(folder)}: {reason_of(error)}") from error
    policy = transcriber.policy
    for batch in table.to_batches(max_chunksize=ENCODE_BATCH):
        rows: list[IndexRow] = batch.to_pylist()
        prompted: list[IndexRow] = []
        results: dict[str, dict[str, str]] = {}
        for row in rows:
            prompt = row["prompt"] or policy.prompts.get(row["task"] or DEFAULT_TASK, "")
            try:
                full_prompt = policy.prompt(prompt, language or row["language"] or policy.language)
                prompted.append({**row, "prompt": full_prompt})
            except ValueError as error:
                results[row["id"]] = {"error": str(error)}
        held, rejects = hold(transcriber, prompted, 0)
        results |= {row["id"]: {"text": row["hypothesis"]} for row in transcriber.write(held)}
        results |= {reject.id: {"error": f"{reject.reason}: {reject.detail}"} for reject in rejects}
        yield from ({**_manifest_fields(row), **results[row["id"]]} for row in rows)


def _manifest_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest fields of an index row: id, audio, its span, language and speaker."""
    fields = {"id": row["id"], "audio": row["uri"]}
    if row["start"] or row["duration"] is not None:
        duration = row["duration"]
        fields["offset"] = row["start"]
        fields["duration"] = row["samples"] / SAMPLING_RATE if duration is None else duration
    return {**fields, **{k: row[k] for k in ("language", "speaker") if row[k] is not None}}
