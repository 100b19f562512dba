"""Features of recordings that several utterances are about, each encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from torch import Tensor

from omni.audio.decode import AudioError, AudioSpan, decode, decode_with_retry, fit
from omni.corpus.index_row import IndexRow, Recording, recordings, span_of
from omni.errors import located
from omni.inference.transcriber import ENCODE_BATCH, Sound, Transcriber
from omni.storage.path import join
from omni.storage.uri import reason_of
from omni.stream.feature_cache import FeatureCache

Read = Callable[[IndexRow], Iterator[Sequence[Sound]]]
"""Read the recordings of a row, once for each piece. Reading them may raise ValueError."""


def open_cache(transcriber: Transcriber, location: str | None) -> FeatureCache | None:
    """Open the cache of the features of a transcriber's encoder."""
    return None if location is None else FeatureCache(join(location, transcriber.cache_folder))


def audio_of(uri: str, span: AudioSpan, samples: int) -> np.ndarray:
    """Decode a recording; wait for object storage that is unavailable."""
    read = decode_with_retry if "://" in uri else decode
    try:
        return fit(read(uri, span, samples=samples), samples)
    except OSError as error:
        raise RuntimeError(f"{uri}: {reason_of(error)}") from error


def features_of(
    transcriber: Transcriber, wanted: Iterable[Recording], cache: FeatureCache | None
) -> dict[str, Tensor | AudioError]:
    """Return the features of recordings by content key, or why one cannot be read.

    Those that the cache lacks are encoded in one batch, and kept there.
    """
    by_key = {recording["key"]: recording for recording in wanted}
    cached = {} if cache is None else cache.get(by_key)
    device = transcriber.encoder.device
    found: dict[str, Tensor | AudioError] = {
        key: transcriber.codec.decode(data).to(device) for key, data in cached.items()
    }
    audio: dict[str, np.ndarray] = {}
    for key, recording in by_key.items():
        if key not in found:
            try:
                audio[key] = audio_of(recording["uri"], span_of(recording), recording["samples"])
            except AudioError as error:
                found[key] = error
    encoded = _encode(transcriber, audio, by_key)
    if cache is not None:
        cache.put({key: transcriber.codec.encode(features) for key, features in encoded.items()})
    return found | {key: transcriber.codec.roundtrip(f) for key, f in encoded.items()}


def _encode(
    transcriber: Transcriber, audio: dict[str, np.ndarray], by_key: dict[str, Recording]
) -> dict[str, Tensor]:
    """Encode recordings in one batch; the error of one names its file."""
    if not audio:
        return {}
    try:
        return dict(zip(audio, transcriber.encoder.encode(list(audio.values())), strict=True))
    except Exception as error:
        if len(audio) == 1:
            [key] = audio
            raise located(error, by_key[key]["uri"]) from error
        return {
            key: features
            for one in audio
            for key, features in _encode(transcriber, {one: audio[one]}, by_key).items()
        }


def cached_reader(
    transcriber: Transcriber,
    table: pa.Table,
    cache: FeatureCache,
    pieces_of: Callable[[IndexRow], Iterator[Sequence[Sound]] | None],
) -> Read:
    """Return what reads the rows of an index, in order, as features by way of a cache.

    pieces_of: reads a row that is decoded in pieces; None for any other row.
    """

    def every() -> Iterator[Iterator[Sequence[Sound]]]:
        for batch in table.to_batches(max_chunksize=ENCODE_BATCH):
            rows: list[IndexRow] = batch.to_pylist()
            cut = [pieces_of(row) for row in rows]
            whole = [row for row, pieces in zip(rows, cut, strict=True) if pieces is None]
            found = features_of(transcriber, (r for row in whole for r in recordings(row)), cache)
            for row, pieces in zip(rows, cut, strict=True):
                yield _features(row, found) if pieces is None else pieces

    following = every()
    return lambda row: next(following)


def _features(row: IndexRow, found: dict[str, Tensor | AudioError]) -> Iterator[Sequence[Sound]]:
    """Return the features of a row's recordings. Raises AudioError for one that has none."""
    sounds: list[Sound] = []
    for recording in recordings(row):
        features = found[recording["key"]]
        if isinstance(features, AudioError):
            raise features
        sounds.append(features)
    yield sounds
