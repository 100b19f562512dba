"""Find speech in a recording of any length with Silero VAD.

Its weights are part of its package, and it needs only torch. Its state is carried from one block of
audio to the next, so the spans do not depend on the blocks and memory does not grow with the file.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from omni.audio.decode import AudioSpan, RecordingData, decode_blocks
from omni.audio.windows import SAMPLING_RATE

_CHUNK = 512  # samples per call of the model
_WHOLE_FILE = AudioSpan()


@dataclass(frozen=True)
class Segmenting:
    """Segmentation by voice activity, in seconds. Raises ValueError naming the field."""

    longest: float = 30.0
    """Maximum length of a span with its padding; longer speech is cut at its longest pause."""
    shortest: float = 0.25
    """Shorter speech is dropped."""
    silence: float = 0.5
    """Minimum length of a pause between two spans."""
    padding: float = 0.1
    """Audio kept before and after speech."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1e6:
                raise ValueError(f"{name}_seconds: expected 0 or more, got {value}")
        least = max(1.0, self.shortest + 2 * self.padding + 0.1)
        if self.longest < least:
            raise ValueError(f"longest_seconds: expected {least:g} or more, got {self.longest:g}")


def speech_spans(
    data: RecordingData,
    settings: Segmenting = Segmenting(),
    within: AudioSpan = _WHOLE_FILE,
    block_seconds: float = 30.0,
) -> list[tuple[float, float]]:
    """Find the spans of speech as (start, duration) in seconds, in order and without overlap.

    data: a path, or the bytes of a file. within: the part of it to search.
    Memory: one block, and 4 bytes per 32 ms of audio. Not thread-safe: calls share a model.
    Raises AudioError as `omni.audio.decode.decode_blocks`.
    """
    probabilities, samples = speech_probabilities(decode_blocks(data, block_seconds, within))
    return [
        (
            round(within.start + start / SAMPLING_RATE, 6),
            round((stop - start) / SAMPLING_RATE, 6),
        )
        for start, stop in spans_of_probabilities(probabilities, samples, settings)
    ]


def spans_of_probabilities(
    probabilities: Sequence[float], samples: int, settings: Segmenting
) -> list[tuple[int, int]]:
    """Find the spans of speech as (start, stop) in samples, in order and without overlap.

    probabilities: of each chunk, as `speech_probabilities` returns them.
    """
    from silero_vad import get_speech_timestamps_from_probs

    found = get_speech_timestamps_from_probs(
        probabilities,
        audio_length_samples=samples,
        max_speech_duration_s=settings.longest,
        min_speech_duration_ms=1000 * settings.shortest,
        min_silence_duration_ms=1000 * settings.silence,
        speech_pad_ms=1000 * settings.padding,
    )
    return [(span["start"], span["end"]) for span in found]


def speech_probabilities(blocks: Iterable[np.ndarray]) -> tuple[array[float], int]:
    """Compute the probability of speech in each chunk, and count the samples.

    The last chunk is padded with zeros.
    """
    import torch  # It takes seconds to import, and indexing needs only `Segmenting`.

    model = _model()
    model.reset_states()
    probabilities, samples = array("f"), 0
    left = np.zeros(0, np.float32)
    with torch.inference_mode():
        for block in blocks:
            samples += len(block)
            audio = np.concatenate((left, block))
            whole = len(audio) // _CHUNK * _CHUNK
            left = audio[whole:]
            for chunk in torch.from_numpy(audio[:whole]).view(-1, _CHUNK):
                probabilities.append(model(chunk, SAMPLING_RATE).item())
        if len(left):
            last = torch.from_numpy(np.pad(left, (0, _CHUNK - len(left))))
            probabilities.append(model(last, SAMPLING_RATE).item())
    return probabilities, samples


@functools.cache
def _model() -> Any:
    import torch

    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    # Importing the package has set one thread for the whole process.
    torch.set_num_threads(threads)
    return load_silero_vad()
