"""Settings that the stages of the stream receive: small and picklable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from omni.audio.logmel import Mode
from omni.config import Config
from omni.storage.path import join
from omni.stream.codec import DTYPES, FeatureCodec
from omni.stream.encoder_facts import EncoderFacts
from omni.stream.feature_cache import FeatureCache


class EncoderArguments(TypedDict):
    """Arguments of `WhisperEncoder`, except for the device."""

    hf_id: str
    mode: Mode
    margin_seconds: float
    layers: Literal["last", "all"] | Sequence[int]
    dtype: torch.dtype
    frame_budget: int | None


@dataclass(frozen=True)
class StreamSettings:
    """Settings of the load and encode stages."""

    config: Config
    n_mels: int
    codec: FeatureCodec
    cache: str | None
    """Location of this encoder's features; None: nothing is cached."""
    encoder: EncoderArguments
    keep_features: bool = True
    """False: features go to the cache only, and the rows of the stream have none."""
    bins_per_block: int = 1
    fingerprint: str = ""
    """Hash of the encoder's weights, compared on each node; empty: not compared."""

    def open_cache(self) -> FeatureCache | None:
        if self.cache is None:
            return None
        limit = self.config.data.cache_gb
        return FeatureCache(self.cache, limit_bytes=None if limit is None else int(limit * 1e9))


def stream_settings(config: Config, facts: EncoderFacts) -> StreamSettings:
    """Combine the configuration with the facts about its encoder."""
    encoder = config.encoder
    return StreamSettings(
        config=config,
        n_mels=facts.n_mels,
        codec=facts.codec,
        cache=None if config.cache is None else join(config.cache, facts.cache_folder),
        encoder={
            "hf_id": encoder.weights,
            "mode": encoder.mode,
            "margin_seconds": encoder.margin_seconds,
            "layers": encoder.layers,
            "dtype": DTYPES[encoder.dtype],
            "frame_budget": encoder.frame_budget,
        },
        bins_per_block=config.optim.bins_per_block,
        fingerprint=facts.fingerprint,
    )
