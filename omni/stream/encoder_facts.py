"""Describe the frozen encoder of a run: the identity of its features and their layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from omni.audio.windows import SAMPLING_RATE, Mode
from omni.config import Config
from omni.corpus.index import Index
from omni.errors import ConfigError
from omni.model.download import HubError, SourceError
from omni.model.encoder.weights import local_whisper
from omni.model.encoder.whisper import WhisperEncoder
from omni.stream.codec import DTYPES, FeatureCodec, Format

_LONGEST_QUANTILE = 0.99


class EncoderArguments(TypedDict):
    """Arguments of `WhisperEncoder` that determine its features."""

    hf_id: str
    mode: Mode
    margin_seconds: float
    layers: Literal["last"] | Sequence[int]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Encoder settings and weights that determine the features; saved in every checkpoint.

    Fields with a default are absent from checkpoints of older versions.
    """

    source: str
    """`encoder.weights`: embedded, hub, or a folder."""
    mode: Mode
    margin_seconds: float
    dtype: str
    format: Format = "exact"
    fingerprint: str
    """Hash of the weights."""
    d_model: int
    """Width of one encoder layer."""
    layers: list[int] = field(default_factory=list)
    """Layers whose outputs are concatenated; empty: the last one alone."""
    n_mels: int
    longest_seconds: float
    """Duration that 99 % of the training utterances do not exceed."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderFacts:
        """Read the `encoder` entry of a checkpoint."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> list[str]:
        """Values that two encoders must share to compute the same features."""
        values = [self.fingerprint, self.mode, str(self.margin_seconds), self.dtype]
        # Caches and runs of older versions have names without these two.
        if self.format != "exact":
            values.append(self.format)
        if self.layers:
            values.append("layers" + ".".join(map(str, self.layers)))
        return values

    @property
    def cache_folder(self) -> str:
        """Name of the folder in `data.cache` that holds the features of this encoder."""
        return "-".join(self.identity)

    @property
    def arguments(self) -> EncoderArguments:
        return {
            "hf_id": self.source,
            "mode": self.mode,
            "margin_seconds": self.margin_seconds,
            "layers": self.layers or "last",
            "dtype": DTYPES[self.dtype],
        }

    @property
    def codec(self) -> FeatureCodec:
        width = self.d_model * max(1, len(self.layers))
        return FeatureCodec(width, DTYPES[self.dtype], self.format)


def describe_encoder(config: Config, train: Index) -> EncoderFacts:
    """Load the configured encoder and describe it.

    Raises ConfigError for wrong weights or settings, HubError when no hub answers.
    """
    settings = config.encoder
    try:
        if settings.weights not in ("embedded", "hub"):
            local_whisper(settings.weights)
        encoder = WhisperEncoder(
            settings.weights,
            mode=settings.mode,
            margin_seconds=settings.margin_seconds,
            layers=settings.layers,
        )
    except HubError:
        raise
    except SourceError as error:
        raise ConfigError(f"encoder.weights: {error}") from None
    except ValueError as error:
        raise ConfigError(f"encoder.layers: {error}") from None
    longest = float(np.quantile(train.table["samples"].to_numpy(), _LONGEST_QUANTILE))
    return EncoderFacts(
        source=settings.weights,
        mode=settings.mode,
        margin_seconds=settings.margin_seconds,
        dtype=settings.dtype,
        format=settings.format,
        fingerprint=encoder.fingerprint,
        d_model=encoder.d_model,
        layers=encoder.layer_ids,
        n_mels=encoder.n_mels,
        longest_seconds=longest / SAMPLING_RATE,
    )
