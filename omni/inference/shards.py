"""Transcribe an index in shards, whose transcripts are files: what is finished is not done again.

FOLDER/DIGEST/000000.jsonl    a line for each row of a shard, in order; it appears when it is whole

DIGEST names the checkpoint, the decoding and the rows, so that nothing else is taken for finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from omni.audio.decode import AudioError
from omni.audio.windows import SAMPLING_RATE
from omni.checkpoint.checkpoint import STATE_FILE
from omni.corpus.index_row import IndexRow, recordings, span_of
from omni.inference.features import audio_of
from omni.inference.rows import has_long, pieces_of, tagger, transcribe_rows
from omni.inference.transcriber import Sound, Transcriber, Transcript
from omni.model.decode import AS_TRAINED, DecodingOptions
from omni.storage.atomic import write_atomic
from omni.storage.digest import digest
from omni.storage.path import StoragePath, as_path
from omni.stream.feature_cache import FeatureCache

_SHARD_ROWS = 256
_SHARD_SECONDS = 1800.0
"""A shard has at most so much audio, or one row."""


@dataclass(frozen=True)
class Decoder:
    """Load the same model with the same decoding in any process.

    cache: folder or URI of features (`data.cache` of a training); None: none are kept. language:
    code for the prompt, see `Transcriber.request`.
    """

    checkpoint: str
    device: str = "cpu"
    threads: int = 1
    options: DecodingOptions = AS_TRAINED
    language: str | None = None
    cache: str | None = None
    tag: bool = True
    """Put the language into the prompts of rows, as for new recordings; False: those of an
    evaluation have it already."""

    def load(self) -> Transcriber:
        """Load the checkpoint. Raises ConfigError."""
        import torch

        torch.set_num_threads(self.threads)
        transcriber = Transcriber.load(as_path(self.checkpoint), self.device, self.options)
        transcriber.check_language(self.language)
        return transcriber

    def load_on_driver(self) -> Transcriber:
        """Load the checkpoint on CPU: the driver's node need not have a GPU."""
        return replace(self, device="cpu").load()

    def identity(self, table: pa.Table) -> str:
        """Name what the transcripts of these rows depend on."""
        state = (as_path(self.checkpoint) / STATE_FILE).read_bytes()
        options = self.options
        given = (options.max_new_tokens, options.decode, options.ctc_weight)
        settings = [*given, self.language, self.tag]
        # Finished shards of versions without these settings stay finished.
        if options.beam is not None:
            settings.append(f"beam {options.beam}")
        if options.sampling.draws_tokens:
            settings.append(f"{options.sampling}")
        columns = ("id", "key", "samples", "prompt", "language", "task", "messages")
        rows = table.select([name for name in columns if name in table.column_names])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows.combine_chunks())
        return digest(state, repr(settings), sink.getvalue(), size=12)


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `first + count` of an index, and the file of their transcripts."""

    first: int
    count: int
    seconds: float
    path: StoragePath

    @property
    def done(self) -> bool:
        return self.path.is_file()


def cut_shards(table: pa.Table, folder: StoragePath, identity: str) -> list[Shard]:
    """Cut an index into shards, in order."""
    shards: list[Shard] = []
    first, seconds = 0, 0.0
    lengths = [samples / SAMPLING_RATE for samples in table["samples"].to_pylist()]

    def close(last: int) -> None:
        path = folder / identity / f"{len(shards):06}.jsonl"
        shards.append(Shard(first, last - first, seconds, path))

    for number, length in enumerate(lengths):
        full = number - first == _SHARD_ROWS or seconds + length > _SHARD_SECONDS
        if number > first and full:
            close(number)
            first, seconds = number, 0.0
        seconds += length
    if lengths:
        close(len(lengths))
    return shards


Loaded = dict[str, Any]
"""Of a row: `sounds` (bytes of features, or of fp32 audio, for each recording), `features` (whether
they are), and `error`. A long recording has none: it is read in pieces where it is decoded."""


def load_row(row: IndexRow, longest_piece: float, cached: Mapping[str, bytes]) -> Loaded:
    """Decode the recordings of a row, but for those whose features are known."""
    if row["messages"] is None and has_long(row, longest_piece):
        return {"sounds": None, "features": None, "error": None}
    sounds: list[bytes] = []
    known: list[bool] = []
    try:
        for recording in recordings(row):
            data = cached.get(recording["key"])
            known.append(data is not None)
            if data is None:
                audio = audio_of(recording["uri"], span_of(recording), recording["samples"])
                data = audio.astype(np.float32).tobytes()
            sounds.append(data)
    except AudioError as error:
        return {"sounds": None, "features": None, "error": [error.reason, error.detail]}
    return {"sounds": sounds, "features": known, "error": None}


def load_rows(
    rows: Sequence[IndexRow], longest_piece: float, cache: FeatureCache | None
) -> list[Loaded]:
    """Load the rows of a shard: features from the cache, and the audio of the others."""
    keys = [recording["key"] for row in rows for recording in recordings(row)]
    cached = {} if cache is None else cache.get(keys)
    return [load_row(row, longest_piece, cached) for row in rows]


def transcribe_shard(
    transcriber: Transcriber,
    table: pa.Table,
    loaded: Sequence[Loaded],
    decoder: Decoder,
    cache: FeatureCache | None,
    path: StoragePath,
) -> dict[str, Any]:
    """Transcribe the rows of a shard and write its file; return counts."""
    found_of = iter(loaded)

    def read(row: IndexRow, of_row: Loaded) -> Iterator[Sequence[Sound]]:
        if of_row["error"] is not None:
            raise AudioError(*of_row["error"])
        if of_row["sounds"] is None:
            yield from pieces_of(transcriber, row)
            return
        yield _sounds(transcriber, row, of_row, cache)

    lines = []
    pairs = transcribe_rows(
        transcriber,
        table,
        tagger(transcriber, decoder.language) if decoder.tag else None,
        lambda row: read(row, next(found_of)),
    )
    cut = errors = 0
    for row, found in pairs:
        lines.append(json.dumps({"id": row["id"], **_stored(found)}, ensure_ascii=False) + "\n")
        errors += isinstance(found, ValueError)
        cut += isinstance(found, Transcript) and found.cut
    if cache is not None:
        cache.flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines).encode())
    return {"rows": len(lines), "errors": errors, "cut": cut}


def _sounds(
    transcriber: Transcriber, row: IndexRow, loaded: Loaded, cache: FeatureCache | None
) -> list[Sound]:
    """Return the features of a row's recordings; encode those that the cache lacks, and keep them.

    Without a cache, audio is left to be encoded with that of other rows.
    """
    sounds: list[Sound] = []
    for recording, data, known in zip(
        recordings(row), loaded["sounds"], loaded["features"], strict=True
    ):
        if known:
            sounds.append(transcriber.codec.decode(data).to(transcriber.encoder.device))
            continue
        audio = np.frombuffer(data, np.float32).copy()  # torch wants to own it
        if cache is None:
            sounds.append(audio)
            continue
        encoded = transcriber.codec.encode(transcriber.encoder.encode([audio])[0])
        cache.put({recording["key"]: encoded})
        sounds.append(transcriber.codec.decode(encoded).to(transcriber.encoder.device))
    return sounds


def _stored(found: Transcript | ValueError) -> dict[str, Any]:
    if isinstance(found, AudioError):
        return {"error": [found.reason, found.detail]}
    if isinstance(found, ValueError):
        return {"error": [str(found)]}
    return asdict(found)


def read_shard(shard: Shard) -> Iterator[tuple[str, Transcript | ValueError]]:
    """Read the file of a shard: the id of each row, and its transcript or error."""
    for line in shard.path.read_bytes().splitlines():
        row = json.loads(line)
        name, error = row.pop("id"), row.pop("error", None)
        if error is None:
            yield name, Transcript(**row)
        else:
            yield name, AudioError(*error) if len(error) == 2 else ValueError(*error)


def transcripts(
    table: pa.Table, shards: Sequence[Shard]
) -> Iterator[tuple[IndexRow, Transcript | ValueError]]:
    """Yield each row of an index with its transcript, in order."""
    for shard in shards:
        rows = table.slice(shard.first, shard.count).to_pylist()
        for row, (name, found) in zip(rows, read_shard(shard), strict=True):
            if row["id"] != name:
                raise RuntimeError(f"{shard.path}: expected row {row['id']!r}, found {name!r}")
            yield row, found
