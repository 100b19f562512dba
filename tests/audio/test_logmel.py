"""The log-mel front end is that of transformers, to the last bit, on real recordings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from omni.audio.logmel import log_mel
from omni.audio.windows import HOP, WINDOW_SAMPLES
from omni.model.encoder.weights import EMBEDDED_WHISPER


def extractor(n_mels: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor.from_pretrained(EMBEDDED_WHISPER, feature_size=n_mels)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_a_clip_padded_to_30_s_equals_the_feature_extractor(
    clips: list[np.ndarray], n_mels: int
) -> None:
    reference = extractor(n_mels)
    for clip in clips[:12]:
        wanted = reference(clip, sampling_rate=16_000, return_tensors="pt").input_features[0]
        mel = log_mel(clip, n_mels, WINDOW_SAMPLES)
        assert mel.shape == (n_mels, 3000) and mel.dtype == torch.float32
        assert torch.equal(mel, wanted)


def test_a_clip_at_its_own_length_equals_the_feature_extractor_without_padding(
    clips: list[np.ndarray],
) -> None:
    reference = extractor(80)
    for clip in clips[:12]:
        clip = clip[: len(clip) // HOP * HOP]
        wanted = reference(
            clip, sampling_rate=16_000, padding="do_not_pad", return_tensors="pt"
        ).input_features[0]
        mel = log_mel(clip, 80)
        assert mel.shape == (80, len(clip) // HOP)
        assert torch.equal(mel, wanted)


def test_padding_is_silence_after_the_clip(clips: list[np.ndarray]) -> None:
    clip = clips[0]
    samples = (len(clip) // HOP + 50) * HOP
    by_hand = np.concatenate((clip, np.zeros(samples - len(clip), dtype=np.float32)))
    assert torch.equal(log_mel(clip, 80, samples), log_mel(by_hand, 80))


def test_values_span_eight_decades_below_the_loudest(clips: list[np.ndarray]) -> None:
    mel = log_mel(clips[0], 80, WINDOW_SAMPLES)
    # (x + 4) / 4 of a span of 8 decades is a span of 2.
    assert float(mel.max() - mel.min()) == pytest.approx(2.0)


def test_silence_has_a_finite_floor() -> None:
    mel = log_mel(np.zeros(16_000, dtype=np.float32), 80)
    assert torch.equal(mel, torch.full((80, 100), (-10.0 + 4.0) / 4.0))
