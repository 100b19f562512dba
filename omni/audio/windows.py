"""Lengths of audio in samples, frames and windows of Whisper's encoder; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SAMPLING_RATE = 16_000
SAMPLES_PER_HOUR = 3600 * SAMPLING_RATE
HOP = 160  # samples per mel frame: 100 frames/s
FRAME = 2 * HOP  # samples per encoder frame: conv2 has stride 2, so 50 frames/s
FRAMES_PER_SECOND = SAMPLING_RATE // FRAME
WINDOW_SAMPLES = 30 * SAMPLING_RATE  # The encoder has position embeddings for 30 s.
WINDOW_FRAMES = WINDOW_SAMPLES // FRAME  # 1500
MIN_SAMPLES = SAMPLING_RATE // 2  # A shorter input gives the encoder too little context.

Mode = Literal["full", "trim"]


@dataclass(frozen=True)
class Window:
    """A span of a clip that the encoder sees at once. Lengths are in samples at 16 kHz."""

    start: int
    stop: int
    padded: int
    """Length after zero padding, a multiple of `FRAME`."""
    frames: int
    """Encoder frames that are kept; those of the padding are dropped in mode `trim`."""


def plan_windows(samples: int, mode: Mode, margin_seconds: float = 0.5) -> list[Window]:
    """Cut a clip of `samples` into consecutive encoder windows of at most 30 s.

    mode `full` pads every window to 30 s; `trim` pads it by `margin_seconds` of silence. A last
    window under 0.5 s would lack context, so it takes 0.5 s over from the window before it; every
    sample is encoded exactly once.
    """
    starts = list(range(0, max(samples, 1), WINDOW_SAMPLES))
    if len(starts) > 1 and samples - starts[-1] < MIN_SAMPLES:
        starts[-1] -= MIN_SAMPLES
    windows = []
    for start, stop in zip(starts, starts[1:] + [samples], strict=True):
        real = stop - start
        if mode == "full":
            windows.append(Window(start, stop, WINDOW_SAMPLES, WINDOW_FRAMES))
            continue
        wanted = max(real + round(margin_seconds * SAMPLING_RATE), MIN_SAMPLES)
        padded = min(-(-wanted // FRAME) * FRAME, WINDOW_SAMPLES)
        windows.append(Window(start, stop, padded, -(-real // FRAME)))
    return windows


def encoder_frames(samples: int, mode: Mode) -> int:
    """Count the encoder frames of a clip: 20 ms each in `trim`, 1500 per window in `full`."""
    return sum(window.frames for window in plan_windows(samples, mode))
