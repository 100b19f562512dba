"""Describe the encoder of a run: identity of its features, settings for the stages."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni.audio.logmel import SAMPLING_RATE
from omni.config import Config
from omni.corpus.index import Index
from omni.errors import ConfigError
from omni.model.download import HubError, SourceError
from omni.model.encoder.weights import local_whisper
from omni.model.encoder.whisper import WhisperEncoder
from omni.storage.path import join
from omni.stream.codec import DTYPES, FeatureCodec
from omni.stream.stages import StreamSettings


def encoder_settings(config: Config, facts: dict[str, Any]) -> StreamSettings:
    """What the stages of the stream need to know of the encoder that `facts` describe."""
    encoder = config.encoder
    return StreamSettings(
        config=config,
        n_mels=facts["n_mels"],
        codec=FeatureCodec.of(facts),
        cache=None if config.cache is None else join(config.cache, encoder_key(facts)),
        encoder={
            "hf_id": encoder.weights,
            "mode": encoder.mode,
            "margin_seconds": encoder.margin_seconds,
            "layers": encoder.layers,
            "dtype": DTYPES[encoder.dtype],
            "frame_budget": encoder.frame_budget,
        },
        bins_per_block=config.optim.bins_per_block,
        fingerprint=facts["fingerprint"],
    )


def encoder_facts(config: Config, train: Index) -> dict[str, Any]:
    """What made the features, and how long the utterances were: checkpoints keep it."""
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
    except (SourceError, ValueError) as error:
        raise ConfigError(f"encoder.weights: {error}") from None
    longest_samples = float(np.quantile(train.table["samples"].to_numpy(), 0.99))
    return {
        "source": settings.weights,
        "mode": settings.mode,
        "margin_seconds": settings.margin_seconds,
        "dtype": settings.dtype,
        "format": settings.format,
        "fingerprint": encoder.fingerprint,
        "d_model": encoder.d_model,
        "layers": encoder.layer_ids,
        "n_mels": encoder.n_mels,
        "longest_seconds": longest_samples / SAMPLING_RATE,
    }


def encoder_key(encoder: dict[str, Any]) -> str:
    """Names the folder of features that this encoder makes."""
    return "-".join(encoder_identity(encoder))


def encoder_identity(encoder: dict[str, Any]) -> list[str]:
    """What two encoders must share to make the same features."""
    names = ["fingerprint", "mode", "margin_seconds", "dtype"]
    names += ["format"] if encoder["format"] != "exact" else []
    identity = [str(encoder[name]) for name in names]
    layers = encoder.get("layers")
    return identity + (["layers" + ".".join(map(str, layers))] if layers else [])
