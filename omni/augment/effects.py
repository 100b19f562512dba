"""Change waveforms and log-mels: pure functions.

Audio is (S,) float32 mono at 16 kHz, in and out. It may exceed [-1, 1]: nothing downstream clips.
"""

from __future__ import annotations

import functools

import numpy as np
import soxr

from omni.audio.windows import SAMPLING_RATE
from omni.augment.speed import changed_length

TELEPHONE_HZ = (300.0, 3400.0)  # ITU-T G.712
_TAPS = 511  # Blackman's window: 74 dB down within 90 Hz of an edge
_MU = 255.0  # ITU-T G.711, North America and Japan


def change_speed(audio: np.ndarray, speed: float) -> np.ndarray:
    """Play audio `speed` times as fast, changing pitch and tempo, by resampling."""
    if speed == 1.0:
        return audio
    changed = soxr.resample(audio, SAMPLING_RATE * speed, SAMPLING_RATE)
    samples = changed_length(len(audio), speed)  # The resampler may round differently.
    return np.pad(changed[:samples], (0, max(0, samples - len(changed)))).astype(np.float32)


def gain(audio: np.ndarray, decibels: float) -> np.ndarray:
    return (audio * 10 ** (decibels / 20)).astype(np.float32)


def mix(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise of the same length at a ratio of mean powers of `snr_db`.

    Where either is silent there is no ratio, and the audio is returned unchanged.
    """
    if not (power(audio) > 0 and power(noise) > 0):
        return audio
    scale = np.sqrt(power(audio) / power(noise)) * 10 ** (-snr_db / 20)
    return np.asarray(audio + scale * noise, np.float32)


def power(audio: np.ndarray) -> float:
    """Compute the mean square."""
    return float(np.mean(np.square(audio, dtype=np.float64))) if len(audio) else 0.0


def reverberate(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve audio with a room's impulse response.

    The direct sound (the peak of the response) keeps its time; length and mean power are kept.
    """
    if not power(response) > 0:
        return audio
    wet = _convolve(audio, response, int(np.abs(response).argmax()))
    if not power(wet) > 0:
        return audio
    return np.asarray(wet * np.sqrt(power(audio) / power(wet)), np.float32)


def made_response(
    generator: np.random.Generator, seconds: float, direct_db: float, rate: int = SAMPLING_RATE
) -> np.ndarray:
    """Make an impulse response after Polack (1988): exponentially decaying white noise.

    seconds: time until the tail is 60 dB down. direct_db: direct sound over the whole tail.
    """
    times = np.arange(1, max(2, round(seconds * rate))) / rate
    tail = generator.standard_normal(len(times)) * np.exp(-np.log(1e3) / seconds * times)
    tail *= 10 ** (-direct_db / 20) / np.sqrt(np.square(tail).sum())
    return np.concatenate(([1.0], tail)).astype(np.float32)


def telephone(audio: np.ndarray) -> np.ndarray:
    """Simulate a telephone line: band-pass, 8 kHz, 8-bit mu-law, band-pass."""
    narrow = _convolve(audio, _telephone_band(), _TAPS // 2)[::2]
    loud = np.log1p(_MU * np.abs(np.clip(narrow, -1, 1))) / np.log1p(_MU)
    loud = np.round(loud * 127) / 127
    received = np.zeros(len(audio))
    received[::2] = 2 * np.sign(narrow) * np.expm1(loud * np.log1p(_MU)) / _MU
    return _convolve(received, _telephone_band(), _TAPS // 2).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _telephone_band() -> np.ndarray:
    """Design a linear-phase band-pass: the difference of two windowed sinc low-passes."""
    times = np.arange(_TAPS) - _TAPS // 2
    low, high = (2 * hz / SAMPLING_RATE for hz in TELEPHONE_HZ)
    ideal = high * np.sinc(high * times) - low * np.sinc(low * times)
    return np.asarray(ideal * np.blackman(_TAPS))


def _convolve(audio: np.ndarray, taps: np.ndarray, delay: int) -> np.ndarray:
    """Convolve; return (S,) float64 from `delay` on, as long as the audio."""
    size = 1 << (len(audio) + len(taps) - 2).bit_length()
    product = np.fft.rfft(audio, size) * np.fft.rfft(taps, size)
    return np.asarray(np.fft.irfft(product, size)[delay : delay + len(audio)])


def mask(
    mel: np.ndarray, axis: int, width: int, generator: np.random.Generator, value: float
) -> None:
    """Overwrite up to `width` neighbouring rows (axis 0) or columns (1), in place.

    As in SpecAugment (Park et al. 2019): the width is drawn from 0 to `width`, then the position.
    """
    size = mel.shape[axis]
    count = int(generator.integers(0, min(width, size) + 1))
    first = int(generator.integers(0, size - count + 1))
    np.moveaxis(mel, axis, 0)[first : first + count] = value
