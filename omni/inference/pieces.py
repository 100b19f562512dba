"""Cut long recordings at pauses of speech into pieces as long as those that a model has learnt.

The exported transcribe.py contains the source of `cut_at_pauses` and `find_pause`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from omni.audio.decode import AudioError
from omni.audio.vad import speech_probabilities
from omni.audio.windows import FRAME, SAMPLING_RATE


def is_long(samples: int, longest_seconds: float) -> bool:
    """Tell whether audio is cut: one that is longer by less than a quarter is not worth it."""
    return samples > round(1.25 * longest_seconds * SAMPLING_RATE)


def cut_at_pauses(blocks: Iterable[np.ndarray], longest_seconds: float) -> Iterator[np.ndarray]:
    """Cut audio into pieces of at most `longest_seconds`; each sample is in one, in order.

    blocks: (S,) fp32 mono at 16 kHz. What remains at the end may be longer by a quarter, and a
    piece that was cut has at least half of that length.
    """
    longest = round(longest_seconds * SAMPLING_RATE)
    audio = np.zeros(0, dtype=np.float32)
    for block in blocks:
        audio = np.concatenate((audio, block))
        while is_long(len(audio), longest_seconds):
            cut = find_pause(audio[:longest], longest // 2)
            yield audio[:cut]
            audio = audio[cut:]
    if len(audio):
        yield audio


def find_pause(audio: np.ndarray, first: int) -> int:
    """Find the sample from `first` on at the quietest place without speech.

    Speech is what Silero VAD takes for it. Where all is speech, the place that is least like it.
    """
    chunk, window = 512, 3  # samples, and chunks: 96 ms
    # The detector needs about a second to settle.
    start = max(0, first - SAMPLING_RATE)
    found, _ = speech_probabilities([audio[start:]])
    probabilities = np.array(found)
    squares = np.square(np.resize(audio[start:], len(probabilities) * chunk), dtype=np.float64)
    energies = squares.reshape(-1, chunk).mean(1)
    skipped = -(-(first - start) // chunk)
    places = np.arange(skipped, max(skipped + 1, (len(audio) - start) // chunk - window + 1))
    near = np.minimum(places[:, None] + np.arange(window), len(probabilities) - 1)
    speech = probabilities[near].max(1)
    silent = speech <= max(0.5, speech.min())
    best = places[silent][energies[near].mean(1)[silent].argmin()]
    return min(start + int(best) * chunk + window * chunk // 2, len(audio))


def fit_blocks(blocks: Iterable[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """Cut a stream of audio to the `samples` of the index, as `omni.audio.decode.fit` does.

    Raises AudioError `length mismatch` at the end for a difference of more than one encoder frame.
    """
    seen = 0
    for block in blocks:
        yield block[: max(0, samples - seen)]
        seen += len(block)
    if abs(seen - samples) > FRAME:
        raise AudioError(
            "length mismatch",
            f"decoded {seen / SAMPLING_RATE:.3f} s, expected {samples / SAMPLING_RATE:.3f} s as in "
            "the index",
        )
