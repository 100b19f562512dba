"""Where somebody speaks in a recording of any length, by Silero VAD.

Its weights come with the package, it runs on torch alone, and its state goes from one block of
audio to the next: the spans do not depend on the blocks, and memory does not grow with the file.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from omni.audio.decode import AudioSpan, Recording, decode_blocks
from omni.audio.logmel import SAMPLING_RATE

_CHUNK = 512  # samples that the model hears at a time
_WHOLE = AudioSpan()


@dataclass(frozen=True)
class Segmenting:
    """How recordings are cut by voice activity, in seconds.

    longest: of a span, with its padding. What is longer is cut at its longest pause, or where it
    must be. shortest: speech that is shorter is left out. silence: a pause that parts two spans.
    padding: kept before and after speech.

    Raises ValueError naming the field.
    """

    longest: float = 30.0
    shortest: float = 0.25
    silence: float = 0.5
    padding: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1e6:
                raise ValueError(f"{name}_seconds: expected 0 or more, got {value}")
        least = max(1.0, self.shortest + 2 * self.padding + 0.1)
        if self.longest < least:
            raise ValueError(f"longest_seconds: expected {least:g} or more, got {self.longest:g}")


def speech_spans(
    data: Recording,
    how: Segmenting = Segmenting(),
    within: AudioSpan = _WHOLE,
    block_seconds: float = 30.0,
) -> list[tuple[float, float]]:
    """(start, duration) in seconds of the recording where somebody speaks, in order and apart.

    data: a path, or the bytes of a file. within: the part of it that is looked at.
    Of a recording it holds a block, and 4 bytes for every 32 ms. Not for several threads at once.
    Raises AudioError as `omni.audio.decode.decode_blocks`.
    """
    from silero_vad import get_speech_timestamps_from_probs

    heard, samples = _probabilities(decode_blocks(data, block_seconds, within))
    found = get_speech_timestamps_from_probs(
        heard,
        audio_length_samples=samples,
        max_speech_duration_s=how.longest,
        min_speech_duration_ms=1000 * how.shortest,
        min_silence_duration_ms=1000 * how.silence,
        speech_pad_ms=1000 * how.padding,
    )
    return [
        (
            round(within.start + span["start"] / SAMPLING_RATE, 6),
            round((span["end"] - span["start"]) / SAMPLING_RATE, 6),
        )
        for span in found
    ]


def _probabilities(blocks: Iterable[np.ndarray]) -> tuple[array[float], int]:
    """Of speech in each chunk, and the number of samples; the last chunk is filled with zeros."""
    model = _model()
    model.reset_states()
    heard, samples = array("f"), 0
    left = np.zeros(0, np.float32)
    with torch.inference_mode():
        for block in blocks:
            samples += len(block)
            audio = np.concatenate((left, block))
            whole = len(audio) // _CHUNK * _CHUNK
            left = audio[whole:]
            for chunk in torch.from_numpy(audio[:whole]).view(-1, _CHUNK):
                heard.append(model(chunk, SAMPLING_RATE).item())
        if len(left):
            last = torch.from_numpy(np.pad(left, (0, _CHUNK - len(left))))
            heard.append(model(last, SAMPLING_RATE).item())
    return heard, samples


@functools.cache
def _model() -> Any:
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)  # its import sets one thread for the whole process
    return load_silero_vad()
