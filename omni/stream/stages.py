"""The work of the stream's stages, without Ray: bins to log-mels, log-mels to features.

load_bin (cache lookup, decode, augment, log-mel) -> EncodeStage (frozen Whisper, cache)

What is augmented is not what its content key names: it goes through both stages without a key, so
that the feature cache can neither give nor take it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from omni.audio.decode import AudioError, decode_patiently, fit
from omni.audio.logmel import SAMPLING_RATE, clip_mel, plan_windows
from omni.augment.augment import Augmentation, Change, augment, mask_windows
from omni.augment.speed import changed_length
from omni.config import Config
from omni.corpus.index_row import IndexRow, Recording, recordings
from omni.corpus.lengths import span_of
from omni.model.encoder.whisper import WhisperEncoder
from omni.plan.plan import Split
from omni.storage.path import register_credentials
from omni.storage.retry import retry_storage
from omni.stream.codec import FeatureCodec, tensor_bytes, tensor_from
from omni.stream.feature_cache import FeatureCache
from omni.stream.schema import ENCODED_SCHEMA


@dataclass(frozen=True)
class StreamSettings:
    """What stages need to know; small and picklable."""

    config: Config
    n_mels: int
    codec: FeatureCodec
    cache: str | None  # location of this encoder's features
    encoder: dict[str, Any]  # arguments of WhisperEncoder
    keep_features: bool = True  # False: only the cache gets them, the stream's rows have none
    bins_per_block: int = 1
    fingerprint: str = ""  # of the encoder's weights

    def open_cache(self) -> FeatureCache | None:
        if self.cache is None:
            return None
        limit = self.config.data.cache_gb
        return FeatureCache(self.cache, limit_bytes=None if limit is None else int(limit * 1e9))


def load_bin(
    split: Split, number: int, settings: StreamSettings, cache: FeatureCache | None
) -> dict[str, Any]:
    """One row of LOADED_SCHEMA. A recording that cannot be used keeps its place with its reason."""
    began = time.perf_counter()
    register_credentials(settings.config.locations)
    members = split.plan.bin(number).tolist()
    rows = split.table.take(pa.array(members, pa.int64())).to_pylist()
    heard = _heard(split, number, rows)
    keys = [[recording.key for recording in of_row] for of_row in heard]
    cached = cache.get(key for key in chain(*keys) if key is not None) if cache is not None else {}
    features = [[cached.get(key) if key else None for key in of_row] for of_row in keys]
    mels: list[list[bytes | None]] = []
    errors: list[str | None] = []
    decoded = 0
    for of_row, known in zip(heard, features, strict=True):
        error = None
        made: list[bytes | None] = []
        for recording, feature in zip(of_row, known, strict=True):
            mel = None
            if feature is None and error is None:
                try:
                    mel = _log_mel(recording, settings)
                    decoded += recording.place["samples"]
                except AudioError as problem:
                    error = f"{problem.reason}\n{problem.detail}"
            made.append(mel)
        mels.append(made)
        errors.append(error)
    _hold_back(decoded / SAMPLING_RATE, time.perf_counter() - began, settings)
    columns = {
        name: [row[column] for row in rows]
        for name, column in (
            ("ids", "id"),
            ("uris", "uri"),
            ("texts", "text"),
            ("languages", "language"),
            ("tokens", "tokens"),
            ("supervised", "supervised"),
            ("heard", "heard"),
            ("tasks", "task_number"),
        )
    }
    lengths = [[recording.samples for recording in of_row] for of_row in heard]
    return {
        "split": split.name,
        "bin": number,
        "numbers": members,
        **columns,
        "samples": [sum(of_row) for of_row in lengths],
        "keys": keys,
        "lengths": lengths,
        "errors": errors,
        "features": features,
        "mels": mels,
        "load_seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True)
class _Recording:
    """A recording as an epoch hears it."""

    place: Recording  # where it lies, and what is known of it: the index's row
    augmentation: Augmentation | None = None
    change: Change | None = None  # None: as it is

    @property
    def key(self) -> str | None:
        """Its name in the feature cache, where it has one."""
        return self.place["key"] if self.change is None else None

    @property
    def samples(self) -> int:
        samples = int(self.place["samples"])
        return samples if self.change is None else changed_length(samples, self.change.speed)


def _heard(split: Split, number: int, rows: list[IndexRow]) -> list[list[_Recording]]:
    """The recordings of each utterance of a bin."""
    spoken, augmentation = [recordings(row) for row in rows], split.augmentation
    if augmentation is None:
        return [[_Recording(place) for place in of_row] for of_row in spoken]
    members, epochs = split.plan.bin(number).tolist(), split.plan.passes_of(number).tolist()
    heard = []
    for member, epoch, of_row in zip(members, epochs, spoken, strict=True):
        drawn = augmentation.change(member, [place["key"] for place in of_row], epoch)
        heard.append(
            [
                _Recording(place) if change.clean else _Recording(place, augmentation, change)
                for place, change in zip(of_row, drawn, strict=True)
            ]
        )
    return heard


def _hold_back(audio: float, seconds: float, settings: StreamSettings) -> None:
    """Wait until `audio` seconds of audio may have been read."""
    rate = settings.config.data.loader_rate
    if rate is not None:
        time.sleep(max(0.0, audio / rate - seconds))


def _log_mel(recording: _Recording, settings: StreamSettings) -> bytes:
    """Bytes of a recording's log-mel in the encoder's dtype: it would round it anyway, and bf16 is
    half the traffic. Raises AudioError.
    """
    encoder, place = settings.config.encoder, recording.place
    audio = decode_patiently(place["uri"], span_of(place))
    audio = fit(audio, place["samples"])
    augmentation, change = recording.augmentation, recording.change
    if augmentation is not None and change is not None:
        audio = augment(audio, change, augmentation)
    mel = clip_mel(audio, settings.n_mels, encoder.mode, encoder.margin_seconds)
    if augmentation is not None and change is not None and change.masks:
        windows = plan_windows(len(audio), encoder.mode, encoder.margin_seconds)
        masked = mask_windows(mel.numpy(), windows, augmentation.settings, change)
        mel = torch.from_numpy(masked)
    return tensor_bytes(mel.to(settings.encoder["dtype"]))


_Name = str | tuple[int, int, int]  # a content key, or a place where augmented audio stands


def _names(number: int, row: dict[str, Any]) -> list[list[_Name]]:
    """What the features of each recording of a block's row go by inside the block."""
    return [
        [(number, i, part) if key is None else key for part, key in enumerate(keys)]
        for i, keys in enumerate(row["keys"])
    ]


def _keys(names: Iterable[_Name]) -> list[str]:
    """Those that the cache may know."""
    return [name for name in names if isinstance(name, str)]


class EncodeStage:
    """Actor: log-mels to features, which also go into the cache."""

    def __init__(self, settings: StreamSettings) -> None:
        torch.set_num_threads(settings.config.encoder.threads)
        arguments = dict(settings.encoder)
        if settings.config.encoder.gpus:
            arguments["device"] = "cuda"
        self._settings = settings
        self._encoder = WhisperEncoder(**arguments)
        if settings.fingerprint and self._encoder.fingerprint != settings.fingerprint:
            raise RuntimeError(
                "this node's encoder weights are not those that the run was planned with; "
                "WHISPER_MS_ID and WHISPER_HF_ID take ID@REVISION"
            )
        self._cache = settings.open_cache()

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        began = time.perf_counter()
        encoded, samples = self._encode(rows)
        seconds = time.perf_counter() - began if samples else 0.0
        codec = self._settings.codec
        done = []
        for number, row in enumerate(rows):
            parts = [
                [
                    known if known is not None else encoded.get(name)
                    for known, name in zip(features, names, strict=True)
                ]
                for features, names in zip(row["features"], _names(number, row), strict=True)
            ]
            # An utterance is used whole or not at all.
            whole = [
                [p for p in of_row if p is not None and None not in of_row] for of_row in parts
            ]
            kept = list(chain(*whole)) if self._settings.keep_features else []
            done.append(
                {
                    **{name: row[name] for name in ENCODED_SCHEMA.names if name in row},
                    "frames": [[codec.frames(part) for part in of_row] for of_row in whole],
                    "features": b"".join(kept),
                    "encode_seconds": seconds / len(rows),
                    "encoded_samples": samples // len(rows),
                    "cache_full": None if self._cache is None else self._cache.full,
                }
            )
        return pa.Table.from_pylist(done, ENCODED_SCHEMA)

    def __del__(self) -> None:
        """Ray lets go of the stage when the stream ends: keep what has not been written yet."""
        cache = getattr(self, "_cache", None)
        if cache is not None:
            cache.flush()

    def _encode(self, rows: list[dict[str, Any]]) -> tuple[dict[_Name, bytes], int]:
        """Features by name of what the rows lack, and how many samples of audio were encoded."""
        missing: dict[_Name, tuple[bytes, int]] = {}
        for number, row in enumerate(rows):
            columns = (chain(*row[name]) for name in ("mels", "lengths"))
            for name, mel, samples in zip(chain(*_names(number, row)), *columns, strict=True):
                if mel is not None:
                    missing[name] = (mel, samples)
        if not missing:
            return {}, 0
        found: dict[_Name, bytes] = {}
        if self._cache is not None:
            # The loader looked a while ago: the block before may have brought some of them.
            found.update(self._cache.get(_keys(missing)))
        fresh = {key: value for key, value in missing.items() if key not in found}
        if fresh:
            encoder, codec = self._encoder, self._settings.codec
            mels = [
                tensor_from(mel, encoder.dtype).view(encoder.n_mels, -1)
                for mel, _ in fresh.values()
            ]
            features = self._features(mels, [count for _, count in fresh.values()])
            made = {key: codec.encode(f) for key, f in zip(fresh, features, strict=True)}
            if self._cache is not None:
                self._cache.put({key: made[key] for key in _keys(made)})
                if not self._settings.keep_features:  # a row that is counted is on disk
                    retry_storage(functools.partial(self._cache.flush, strict=True))
            found = {**found, **made}
        return found, sum(count for _, count in fresh.values())

    def _features(self, mels: list[Tensor], samples: list[int]) -> list[Tensor]:
        """Encode; a batch that the device's memory cannot hold is halved until it can."""
        try:
            return self._encoder.encode_mels(mels, samples)
        except (torch.OutOfMemoryError, MemoryError):
            if len(mels) == 1:
                raise
        if self._settings.config.encoder.gpus:
            torch.cuda.empty_cache()
        half = len(mels) // 2
        first = self._features(mels[:half], samples[:half])
        return first + self._features(mels[half:], samples[half:])
