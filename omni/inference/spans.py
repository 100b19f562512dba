"""Transcripts of spans: of recordings that are cut by voice activity, and of an index's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omni.audio.decode import AudioError, AudioSpan, decode
from omni.audio.logmel import SAMPLING_RATE
from omni.audio.vad import Segmenting, speech_spans
from omni.corpus.index import read_index_folder
from omni.corpus.index_row import IndexRow
from omni.corpus.manifest import ManifestError, manifest_path
from omni.corpus.text import DEFAULT_TASK
from omni.errors import ConfigError
from omni.inference.transcriber import ENCODE_BATCH, Transcriber, hold
from omni.storage.path import as_path, public_uri, reason_of


def transcribe_speech(
    transcriber: Transcriber, files: Sequence[str], language: str | None = None
) -> Iterator[dict[str, Any]]:
    """{"audio", "offset", "duration", "text"} of each span of speech, in seconds, in order; or
    {"audio", "error"} of a file that cannot be read.

    A file is read twice, a block and then a few spans at a time. Raises ConfigError as
    `Transcriber.check_language`.
    """
    transcriber.check_language(language)
    how = Segmenting(longest=transcriber.longest_piece)
    for file in files:
        path, file = as_path(file), public_uri(file)
        try:
            if isinstance(path, Path) and not path.is_file():
                raise AudioError("missing", f"no such file: {file}")
            spans = iter(speech_spans(path, how))
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
    """A line of a manifest for each row of what jobs.index wrote, with or without a text so far;
    "error" in place of "text" where the recording cannot be read.

    Raises ConfigError where the folder holds no index.
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
        asked: list[IndexRow] = []
        said: dict[str, dict[str, str]] = {}  # by id
        for row in rows:
            prompt = row["prompt"] or policy.prompts.get(row["task"] or DEFAULT_TASK, "")
            try:
                told = policy.prompt(prompt, language or row["language"] or policy.language)
                asked.append({**row, "prompt": told})
            except ValueError as error:
                said[row["id"]] = {"error": str(error)}
        held, bad = hold(transcriber, asked, 0)
        said |= {row["id"]: {"text": row["hypothesis"]} for row in transcriber.write(held)}
        said |= {reject.id: {"error": f"{reject.reason}: {reject.detail}"} for reject in bad}
        yield from ({**_place(row), **said[row["id"]]} for row in rows)


def _place(row: Mapping[str, Any]) -> dict[str, Any]:
    """Who speaks where, as a manifest says it."""
    place = {"id": row["id"], "audio": row["uri"]}
    if row["start"] or row["duration"] is not None:
        duration = row["duration"]
        place["offset"] = row["start"]
        place["duration"] = row["samples"] / SAMPLING_RATE if duration is None else duration
    return {**place, **{k: row[k] for k in ("language", "speaker") if row[k] is not None}}
