"""Encode utterances with all layers of the frozen encoder, and pool each layer over time.

Features are the mean and the standard deviation over the frames of an utterance: of each layer as
`encoder.layers: all` gives it, of the same layers with random weights, and of the log-mel. They
are pooled where they are encoded, and kept in one file per unit of some minutes of audio, so the
same command continues a killed one and other labels are probed without an encoder.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from omni.audio.decode import AudioError, decode_with_retry, fit
from omni.audio.windows import HOP, SAMPLES_PER_HOUR, SAMPLING_RATE, WINDOW_SAMPLES, Mode
from omni.cluster.ray_tasks import run_tasks
from omni.corpus.index_row import IndexRow, span_of
from omni.errors import counted, located
from omni.model.encoder.transformer import WhisperTransformer
from omni.model.encoder.whisper import WhisperEncoder
from omni.storage.atomic import write_atomic
from omni.storage.digest import digest

_VERSION = "1"
_UNIT_SECONDS = 300
_BATCH_SECONDS = 30  # encoded together
_SAY_SECONDS = 5.0
MEL = "log-mel"


@dataclass(frozen=True)
class Pooling:
    """The encoder whose features are pooled.

    weights, mode, margin_seconds: as in the settings of the encoder. fingerprint: of the weights.
    seed: of the random weights.
    """

    weights: str
    mode: Mode
    margin_seconds: float
    fingerprint: str
    layers: int
    seed: int = 0

    @property
    def trained(self) -> list[str]:
        """Names of the features of each layer, the input of the first one included."""
        return [f"layer {number}" for number in range(self.layers + 1)]

    @property
    def random(self) -> list[str]:
        """Names of the features of each layer with random weights."""
        return [f"random {number}" for number in range(self.layers + 1)]


def pooling_of(weights: str, mode: Mode, margin_seconds: float, seed: int = 0) -> Pooling:
    """Load the encoder and describe it. Raises SourceError, and HubError when no hub answers."""
    encoder = WhisperEncoder(weights, layers="all")
    layers = encoder.config.encoder_layers
    return Pooling(weights, mode, margin_seconds, encoder.fingerprint, layers, seed)


@dataclass(frozen=True)
class PooledFeatures:
    """Files of pooled features. faults: of rows that could not be decoded, the reason."""

    files: list[Path]
    faults: dict[int, str]

    def load(self, name: str) -> np.ndarray:
        """Load the features of a name of all rows, (n, width) float32; zeros for a fault."""
        parts = []
        for path in self.files:
            with safe_open(path, framework="np") as tensors:
                parts.append(tensors.get_tensor(name))
        return np.concatenate(parts)


def pool_features(
    rows: Sequence[IndexRow], pooling: Pooling, folder: Path, say: Callable[[str], None]
) -> PooledFeatures:
    """Pool the features of the rows into files in `folder`, or take those that are there.

    Of a recording over 30 s, the first 30 s are encoded. Raises RuntimeError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units = _units(rows, pooling)
    todo = [unit for unit in units if not (folder / unit.file).is_file()]
    total = sum(unit.samples for unit in todo)
    say(
        f"{counted(len(rows), 'utterance')}, "
        f"{len(rows) - sum(len(unit.rows) for unit in todo):,} encoded already"
    )
    began = shown = time.monotonic()
    samples = 0
    try:
        for file, data, count in run_tasks(functools.partial(_pool_unit, pooling=pooling), todo):
            write_atomic(folder / file, data)
            samples += count
            now = time.monotonic()
            if now - shown > _SAY_SECONDS or samples == total:
                shown, speed = now, samples / SAMPLING_RATE / max(now - began, 1e-3)
                left = (total - samples) / SAMPLING_RATE / speed
                say(
                    f"{samples / SAMPLES_PER_HOUR:,.2f} of {total / SAMPLES_PER_HOUR:,.2f} h "
                    f"at {speed:,.0f} audio-s/s, {left:,.0f} s left"
                )
    except RuntimeError as error:
        raise RuntimeError(f"encoding stopped: {error}") from error
    faults: dict[int, str] = {}
    first = 0
    for unit in units:
        with safe_open(folder / unit.file, framework="np") as tensors:
            found = json.loads(tensors.metadata()["faults"])
        faults |= {first + int(number): reason for number, reason in found.items()}
        first += len(unit.rows)
    return PooledFeatures([folder / unit.file for unit in units], faults)


@dataclass(frozen=True)
class _Unit:
    rows: list[IndexRow]
    file: str

    @property
    def samples(self) -> int:
        return sum(_samples(row) for row in self.rows)


def _samples(row: IndexRow) -> int:
    return min(row["samples"], WINDOW_SAMPLES)


def _units(rows: Sequence[IndexRow], pooling: Pooling) -> list[_Unit]:
    units: list[_Unit] = []
    taken: list[IndexRow] = []
    seconds = 0.0
    for number, row in enumerate(rows, start=1):
        taken.append(row)
        seconds += _samples(row) / SAMPLING_RATE
        if seconds >= _UNIT_SECONDS or number == len(rows):
            identity = [_VERSION, repr(replace(pooling, weights="")), *(r["key"] for r in taken)]
            units.append(_Unit(taken, f"{digest(*identity)}.safetensors"))
            taken, seconds = [], 0.0
    return units


def _pool_unit(unit: _Unit, pooling: Pooling) -> tuple[str, bytes, int]:
    """Return the file of a unit, its content, and the samples that were encoded."""
    torch.set_num_threads(1)  # As many tasks as cores run beside each other.
    trained, random = _encoders(pooling)
    pooled: list[dict[str, Tensor] | None] = []
    faults: dict[str, str] = {}
    batch: list[tuple[Tensor, int]] = []

    def flush() -> None:
        if batch:
            pooled.extend(_pool(batch, trained, random, pooling))
            batch.clear()

    for number, row in enumerate(unit.rows):
        try:
            audio = _decode(row)
        except AudioError as error:
            flush()
            faults[str(number)] = error.reason
            pooled.append(None)
            continue
        except OSError:
            raise
        except Exception as error:
            raise located(error, f"utterance {row['id']} ({row['uri']})") from error
        batch.append((trained.front_end(audio), len(audio)))
        if sum(count for _, count in batch) >= _BATCH_SECONDS * SAMPLING_RATE:
            flush()
    flush()
    widths = {MEL: 2 * trained.n_mels}
    widths |= dict.fromkeys([*pooling.trained, *pooling.random], 2 * trained.d_model)
    tensors = {
        name: torch.stack([torch.zeros(width) if row is None else row[name] for row in pooled])
        for name, width in widths.items()
    }
    return unit.file, save(tensors, {"faults": json.dumps(faults)}), unit.samples


def _decode(row: IndexRow) -> np.ndarray:
    """Decode the first 30 s of an utterance. Raises AudioError."""
    span, samples = span_of(row), _samples(row)
    if samples < row["samples"]:
        span = replace(span, duration=samples / SAMPLING_RATE)
    return fit(decode_with_retry(row["uri"], span, samples=samples), samples)


def _pool(
    batch: Sequence[tuple[Tensor, int]],
    trained: WhisperEncoder,
    random: WhisperEncoder,
    pooling: Pooling,
) -> list[dict[str, Tensor]]:
    mels, samples = [mel for mel, _ in batch], [count for _, count in batch]
    rows: list[dict[str, Tensor]] = [
        {MEL: _mean_and_deviation(mel[:, : -(-count // HOP)].T)} for mel, count in batch
    ]
    for encoder, names in ((trained, pooling.trained), (random, pooling.random)):
        for row, features in zip(rows, encoder.encode_mels(mels, samples), strict=True):
            by_layer = features.unflatten(1, (len(names), -1)).unbind(1)
            row |= {n: _mean_and_deviation(x) for n, x in zip(names, by_layer, strict=True)}
    return rows


def _mean_and_deviation(x_TD: Tensor) -> Tensor:
    x_TD = x_TD.float()
    return torch.cat((x_TD.mean(0), x_TD.std(0, correction=0)))


@functools.lru_cache(maxsize=1)
def _encoders(pooling: Pooling) -> tuple[WhisperEncoder, WhisperEncoder]:
    """Load the encoder, and once more with random weights. Raises RuntimeError."""
    arguments: Any = {
        "layers": "all",
        "mode": pooling.mode,
        "margin_seconds": pooling.margin_seconds,
    }
    trained = WhisperEncoder(pooling.weights, **arguments)
    if trained.fingerprint != pooling.fingerprint:
        raise RuntimeError(f"--encoder {pooling.weights}: this node has other weights")
    random = WhisperEncoder(pooling.weights, **arguments)
    state = _random_state(random.encoder, pooling.seed)
    random.encoder = WhisperTransformer(random.config, state)
    return trained, random


def _random_state(encoder: WhisperTransformer, seed: int) -> dict[str, Tensor]:
    """Draw weights of variance 1 / inputs; norms, biases and positions are an untrained model's."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, weight in encoder.state_dict().items():
        if name == "embed_positions.weight":  # Whisper's are fixed sinusoids.
            state[name] = weight
        elif weight.ndim > 1:
            drawn = torch.randn(weight.shape, generator=generator)
            state[name] = drawn / weight[0].numel() ** 0.5
        else:
            norm = "norm" in name and name.endswith("weight")
            state[name] = torch.ones_like(weight) if norm else torch.zeros_like(weight)
    return state
