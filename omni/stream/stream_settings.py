"""Settings that the stages of the stream receive: small and picklable."""

from __future__ import annotations

from dataclasses import dataclass

from omni.config import Config
from omni.storage.path import join
from omni.stream.codec import FeatureCodec
from omni.stream.encoder_facts import EncoderArguments, EncoderFacts
from omni.stream.feature_cache import FeatureCache


class StageEncoder(EncoderArguments):
    """Arguments of `WhisperEncoder`, except for the device."""

    frame_budget: int | None


@dataclass(frozen=True)
class StreamSettings:
    """Settings of the load and encode stages."""

    config: Config
    n_mels: int
    codec: FeatureCodec
    cache: str | None
    """Location of this encoder's features; None: nothing is cached."""
    encoder: StageEncoder
    keep_features: bool = True
    """False: features go to the cache only, and the rows of the stream have none."""
    encode: bool = True
    """False: the cache holds all features that are left to read, and the stream has no encoders."""
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
    return StreamSettings(
        config=config,
        n_mels=facts.n_mels,
        codec=facts.codec,
        cache=None if config.cache is None else join(config.cache, facts.cache_folder),
        encoder={**facts.arguments, "frame_budget": config.encoder.frame_budget},
        bins_per_block=config.optim.bins_per_block,
        fingerprint=facts.fingerprint,
    )
