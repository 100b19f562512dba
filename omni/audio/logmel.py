"""Compute Whisper's log-mels of the windows of a clip.

The log-mels equal those of transformers' `WhisperFeatureExtractor` bit for bit
(tests/audio/test_logmel.py), but padding to 30 s is optional: in mode `trim` a clip of 1.4 s takes
190 mel frames instead of 3000.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from omni.audio.windows import HOP, SAMPLING_RATE, Mode, plan_windows

N_FFT = 400


def clip_mel(audio: np.ndarray, n_mels: int, mode: Mode, margin_seconds: float) -> Tensor:
    """Compute the log-mels of a clip's windows, concatenated in time: (n_mels, T_mel) fp32."""
    windows = plan_windows(len(audio), mode, margin_seconds)
    parts = [log_mel(audio[w.start : w.stop], n_mels, w.padded) for w in windows]
    return torch.cat(parts, dim=1)


def log_mel(audio: np.ndarray, n_mels: int, samples: int | None = None) -> Tensor:
    """Compute the log-mel spectrogram of one clip, (n_mels, samples // HOP) fp32.

    audio: (S,) fp32 mono at 16 kHz, zero-padded to `samples`, a multiple of HOP (default: S).
    Formula: power STFT (Hann 400, hop 160, reflected edges, last frame dropped) -> mel -> log10,
    floored at 8 decades below the clip's maximum, then (x + 4) / 4 (Radford et al. 2022, 2.2).
    """
    wave = torch.as_tensor(audio, dtype=torch.float32)
    if samples is not None:
        wave = torch.nn.functional.pad(wave, (0, samples - wave.numel()))
    spectrum = torch.stft(wave, N_FFT, HOP, window=_hann(), return_complex=True)[:, :-1]
    # Take abs() and square it, as transformers does: re^2 + im^2 differs in the last bit, which the
    # encoder amplifies to 2e-4 in its output.
    power = spectrum.abs().square()
    log = (mel_filters(n_mels) @ power).clamp_(min=1e-10).log10_()
    return torch.maximum(log, log.max() - 8.0).add_(4.0).div_(4.0)


@functools.lru_cache(maxsize=4)
def mel_filters(n_mels: int) -> Tensor:
    """Build the Slaney mel filter bank, (n_mels, N_FFT // 2 + 1) fp32, area-normalised, 0 to 8 kHz.

    Linear below 1 kHz (200/3 Hz per mel), logarithmic above (27 mels per factor of 6.4), as in
    Slaney's Auditory Toolbox and librosa, which Whisper was trained with.
    """
    breakpoint_hz, breakpoint_mel, log_step = 1000.0, 15.0, np.log(6.4) / 27.0
    nyquist = SAMPLING_RATE / 2
    top_mel = breakpoint_mel + np.log(nyquist / breakpoint_hz) / log_step
    mels = np.linspace(0.0, top_mel, n_mels + 2)
    hz = np.where(
        mels < breakpoint_mel,
        mels * 200.0 / 3.0,
        breakpoint_hz * np.exp(log_step * (mels - breakpoint_mel)),
    )
    bins = np.linspace(0.0, nyquist, N_FFT // 2 + 1)
    width = np.diff(hz)
    slopes = hz[:, None] - bins[None, :]
    rising = -slopes[:-2] / width[:-1, None]
    falling = slopes[2:] / width[1:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    filters *= (2.0 / (hz[2:] - hz[:-2]))[:, None]
    return torch.from_numpy(filters.astype(np.float32))


@functools.lru_cache(maxsize=1)
def _hann() -> Tensor:
    return torch.hann_window(N_FFT)
