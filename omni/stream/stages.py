"""Stages of the stream, without Ray: bins to log-mels, log-mels to features.

load_bin (cache lookup, decode, augment, log-mel) -> EncodeStage (frozen Whisper, cache)

A content key names the audio as it is in the file. Augmented audio goes through both stages without
a key, so that the feature cache neither serves nor stores it.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import torch
from torch import Tensor

from omni.audio.decode import AudioError, decode, decode_with_retry, fit
from omni.audio.fetch import fetch_ahead
from omni.audio.logmel import clip_mel
from omni.audio.recording import FetchedRecording
from omni.audio.windows import SAMPLING_RATE, plan_windows
from omni.augment.augment import Augmentation, Change, augment, mask_windows
from omni.augment.speed import changed_length
from omni.corpus.index_row import Recording, is_transcription, recordings, span_of
from omni.errors import located
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.precision import limit_gpu_memory
from omni.plan.plan import Members, RowsOfBins
from omni.plan.sequences import PlannedRow
from omni.storage.path import register_credentials
from omni.storage.retry import retry_storage
from omni.stream.codec import tensor_bytes, tensor_from
from omni.stream.encoded_block import Name, encoded_block, recording_names
from omni.stream.feature_cache import FeatureCache
from omni.stream.schema import LoadedRow, Span
from omni.stream.stream_settings import StreamSettings


def load_bin(
    split: RowsOfBins, number: int, settings: StreamSettings, cache: FeatureCache | None
) -> LoadedRow:
    """Load one bin: features from the cache, log-mels of the recordings that it lacks.

    split: the rows that hold the bin, see `Split.of_bin`.

    An utterance with a recording that cannot be used stays in the row, with its error.
    """
    began = time.perf_counter()
    register_credentials(settings.config.locations)
    members = split.members(number)
    rows: list[PlannedRow] = split.table.take(pa.array(members.rows, pa.int64())).to_pylist()
    scheduled = _scheduled_recordings(split.augmentation, members, rows)
    keys = [[recording.key for recording in of_row] for of_row in scheduled]
    cached = {} if cache is None else cache.get(key for key in chain(*keys) if key is not None)
    features = [[cached.get(key) if key else None for key in of_row] for of_row in keys]
    mels: list[list[bytes | None]] = []
    errors: list[str | None] = []
    notes: list[str | None] = []
    decoded = 0
    sources = _Sources(scheduled, features)
    loaded: dict[str, bytes] = {}  # Utterances of several tasks may have the same recording.
    for row, of_row, from_cache in zip(rows, scheduled, features, strict=True):
        error = None
        noted: list[str] = []
        row_mels: list[bytes | None] = []
        for recording, feature in zip(of_row, from_cache, strict=True):
            mel = None
            if feature is None and error is None:
                if recording.key in loaded:
                    row_mels.append(loaded[recording.key])
                    continue
                try:
                    mel = _log_mel(recording, sources.take(recording), settings, noted)
                    decoded += recording.row["samples"]
                    if recording.key is not None and not noted:
                        loaded[recording.key] = mel
                except AudioError as problem:
                    error = f"{problem.reason}\n{problem.detail}"
                except OSError:
                    raise  # It names the file or the storage that does not answer.
                except Exception as problem:
                    where = f"bin {number}, utterance {row['id']} ({recording.row['uri']})"
                    raise located(problem, where) from problem
            row_mels.append(mel)
        mels.append(row_mels)
        errors.append(error)
        notes.append(noted[0] if noted and error is None else None)
    _limit_rate(decoded / SAMPLING_RATE, time.perf_counter() - began, settings)
    lengths = [[recording.samples for recording in of_row] for of_row in scheduled]
    return {
        "split": split.name,
        "bin": number,
        "numbers": members.numbers.tolist(),
        "ids": [row["id"] for row in rows],
        "uris": [row["uri"] for row in rows],
        "spans": [_span(row) for row in rows],
        "texts": [row["text"] for row in rows],
        "languages": [row["language"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "supervised": [row["supervised"] for row in rows],
        "transcript_tokens": [row["transcript_tokens"] for row in rows],
        "tasks": [row["task_number"] for row in rows],
        "transcriptions": [is_transcription(row) for row in rows],
        "samples": [sum(of_row) for of_row in lengths],
        "keys": keys,
        "lengths": lengths,
        "errors": errors,
        "notes": notes,
        "features": features,
        "mels": mels,
        "load_seconds": time.perf_counter() - began,
    }


def _span(row: PlannedRow) -> Span:
    return {
        "start": row["start"],
        "duration": row["duration"],
        "offset": row["offset"],
        "length": row["length"],
    }


@dataclass(frozen=True)
class _ScheduledRecording:
    """A recording with the augmentation of the epoch that its bin belongs to."""

    row: Recording
    augmentation: Augmentation | None = None
    change: Change | None = None
    """None: the audio stays as it is."""

    @property
    def key(self) -> str | None:
        """Key in the feature cache; None for augmented audio."""
        return self.row["key"] if self.change is None else None

    @property
    def samples(self) -> int:
        """Samples at 16 kHz after the change of speed."""
        samples = int(self.row["samples"])
        return samples if self.change is None else changed_length(samples, self.change.speed)


def _scheduled_recordings(
    augmentation: Augmentation | None, members: Members, rows: Sequence[PlannedRow]
) -> list[list[_ScheduledRecording]]:
    """Draw the augmentation of each recording of each utterance of a bin."""
    by_row = [recordings(row) for row in rows]
    if augmentation is None:
        return [[_ScheduledRecording(recording) for recording in of_row] for of_row in by_row]
    numbers, epochs = members.rows.tolist(), members.passes.tolist()
    scheduled = []
    for number, epoch, of_row in zip(numbers, epochs, by_row, strict=True):
        changes = augmentation.change(number, [recording["key"] for recording in of_row], epoch)
        scheduled.append(
            [
                _ScheduledRecording(recording)
                if change.clean
                else _ScheduledRecording(recording, augmentation, change)
                for recording, change in zip(of_row, changes, strict=True)
            ]
        )
    return scheduled


def _limit_rate(audio_seconds: float, seconds: float, settings: StreamSettings) -> None:
    """Sleep until loading so much audio is within `data.loader_rate`."""
    rate = settings.config.data.loader_rate
    if rate is not None:
        time.sleep(max(0.0, audio_seconds / rate - seconds))


class _Sources:
    """Fetch recordings of a bin that have no features, in the order in which they are decoded."""

    def __init__(
        self,
        scheduled: Sequence[Sequence[_ScheduledRecording]],
        features: Sequence[Sequence[bytes | None]],
    ) -> None:
        wanted = [
            recording
            for recording, feature in zip(chain(*scheduled), chain(*features), strict=True)
            if feature is None
        ]
        self._uses = Counter(map(_name_of, wanted))
        self._found: dict[object, FetchedRecording | None] = {}
        first = {_name_of(recording): recording.row for recording in reversed(wanted)}
        self._ahead = fetch_ahead(
            (name, first[name]["uri"], span_of(first[name])) for name in self._uses
        )

    def take(self, recording: _ScheduledRecording) -> FetchedRecording | None:
        """Return the bytes of a recording; None: it is to be opened where it lies.

        Recordings of utterances that have an error already are not asked for.
        """
        name = _name_of(recording)
        while name not in self._found:
            other, fetched = next(self._ahead)
            self._found[other] = fetched
        self._uses[name] -= 1
        return self._found[name] if self._uses[name] else self._found.pop(name)


def _name_of(recording: _ScheduledRecording) -> object:
    """Return what recordings of the same bytes share, and augmented ones do not."""
    return recording.key or id(recording)


def _log_mel(
    recording: _ScheduledRecording,
    fetched: FetchedRecording | None,
    settings: StreamSettings,
    notes: list[str],
) -> bytes:
    """Decode and augment a recording, and compute its log-mel (n_mels, T_mel). Raises AudioError.

    The result has the encoder's dtype: the encoder would round it anyway, and bf16 halves the
    traffic between the stages.
    """
    encoder, row = settings.config.encoder, recording.row
    span, samples = span_of(row), row["samples"]
    if fetched is None:
        audio = decode_with_retry(row["uri"], span, samples=samples, notes=notes)
    else:
        audio = decode(fetched, span, samples=samples, notes=notes)
    audio = fit(audio, row["samples"])
    augmentation, change = recording.augmentation, recording.change
    if augmentation is not None and change is not None:
        audio = augment(audio, change, augmentation)
    mel = clip_mel(audio, settings.n_mels, encoder.mode, encoder.margin_seconds)
    if augmentation is not None and change is not None and change.masks:
        windows = plan_windows(len(audio), encoder.mode, encoder.margin_seconds)
        masked = mask_windows(mel.numpy(), windows, augmentation.settings, change)
        mel = torch.from_numpy(masked)
    return tensor_bytes(mel.to(settings.encoder["dtype"]))


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _cache_keys(names: Iterable[Name]) -> list[str]:
    return [name for name in names if isinstance(name, str)]


class EncodeStage:
    """Encode log-mels, in batches over the rows of a block, and put the features into the cache."""

    def __init__(self, settings: StreamSettings) -> None:
        torch.set_num_threads(settings.config.encoder.threads)
        device = "cuda" if settings.config.encoder.gpus else "cpu"
        self._settings = settings
        self._halvings = 0
        limit_gpu_memory(settings.config.encoder.gpu_memory)
        self._encoder = WhisperEncoder(**settings.encoder, device=device)
        if settings.fingerprint and self._encoder.fingerprint != settings.fingerprint:
            raise RuntimeError(
                "encoder.weights: this node has other weights than the run was planned with; "
                "fix a revision: WHISPER_MS_ID and WHISPER_HF_ID take ID@REVISION"
            )
        self._cache = settings.open_cache()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn a table of `LOADED_SCHEMA` into one of `ENCODED_SCHEMA`, row by row."""
        rows: list[LoadedRow] = table.to_pylist()
        began = time.perf_counter()
        try:
            encoded, samples = self._encode(rows)
        except OSError:
            raise
        except Exception as error:
            missing = [
                name
                for row in rows
                for name, mels in zip(row["ids"], row["mels"], strict=True)
                if any(mel is not None for mel in mels)
            ]
            bins = ", ".join(str(row["bin"]) for row in rows)
            raise located(error, f"bins {bins}, utterances {_listed(missing)}") from error
        seconds = time.perf_counter() - began if samples else 0.0
        full = None if self._cache is None else self._cache.full
        halvings, self._halvings = self._halvings, 0
        return encoded_block(rows, self._settings, encoded, seconds, samples, full, halvings)

    def __del__(self) -> None:
        # Ray drops the actor when the stream ends: write what is still pending.
        cache = getattr(self, "_cache", None)
        if cache is not None:
            cache.flush()

    def _encode(self, rows: Sequence[LoadedRow]) -> tuple[dict[Name, bytes], int]:
        """Encode what the rows lack; returns features by name, and the samples of that audio."""
        missing: dict[Name, tuple[bytes, int]] = {}
        for number, row in enumerate(rows):
            mels, lengths = row["mels"], row["lengths"]
            for name, mel, samples in zip(
                chain(*recording_names(number, row)), chain(*mels), chain(*lengths), strict=True
            ):
                if mel is not None:
                    missing[name] = (mel, samples)
        if not missing:
            return {}, 0
        found: dict[Name, bytes] = {}
        if self._cache is not None:
            # An earlier block may have added some since the load stage looked them up.
            found.update(self._cache.get(_cache_keys(missing)))
        fresh = {name: value for name, value in missing.items() if name not in found}
        if fresh:
            encoder, codec = self._encoder, self._settings.codec
            mels_of_fresh = [
                tensor_from(mel, encoder.dtype).view(encoder.n_mels, -1)
                for mel, _ in fresh.values()
            ]
            features = self._features(mels_of_fresh, [count for _, count in fresh.values()])
            encoded = {name: codec.encode(f) for name, f in zip(fresh, features, strict=True)}
            if self._cache is not None:
                self._cache.put({key: encoded[key] for key in _cache_keys(encoded)})
                if not self._settings.keep_features:
                    # Rows without features are counted as stored, so they must be.
                    retry_storage(functools.partial(self._cache.flush, strict=True))
            found = {**found, **encoded}
        return found, sum(count for _, count in fresh.values())

    def _features(self, mels: list[Tensor], samples: list[int]) -> list[Tensor]:
        """Encode log-mels; halve this encoder's batches until the device's memory holds them.

        They stay so: another process on the same GPU keeps the memory that was missing.
        """
        while True:
            try:
                return self._encoder.encode_mels(mels, samples)
            except (torch.OutOfMemoryError, MemoryError):
                if not self._encoder.halve_batches(samples):
                    raise
            # Outside of the handler, which holds the tensors of the failed call.
            self._halvings += 1
            if self._settings.config.encoder.gpus:
                torch.cuda.empty_cache()
