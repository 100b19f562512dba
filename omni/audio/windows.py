"""How a clip of any length is cut into encoder windows of at most 30 s, in both modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from omni.audio.logmel import FRAME, SAMPLING_RATE, WINDOW_SAMPLES, log_mel

Mode = Literal["full", "trim"]
FULL_FRAMES = WINDOW_SAMPLES // FRAME  # 1500
MIN_SAMPLES = SAMPLING_RATE // 2  # shorter input leaves the encoder without context


@dataclass(frozen=True)
class Window:
    """A span of one clip that is encoded at once; all numbers are samples at 16 kHz."""

    start: int
    stop: int
    padded: int  # length given to the encoder, a multiple of FRAME
    frames: int  # encoder frames that are kept


def plan_windows(samples: int, mode: Mode, margin_seconds: float = 0.5) -> list[Window]:
    """Cut a clip of `samples` into encoder windows of at most 30 s.

    A tail under 0.5 s would be encoded without context, so the window before it ends 0.5 s
    earlier and the tail takes those samples over: nothing is encoded twice or dropped.
    """
    starts = list(range(0, max(samples, 1), WINDOW_SAMPLES))
    if len(starts) > 1 and samples - starts[-1] < MIN_SAMPLES:
        starts[-1] -= MIN_SAMPLES
    windows = []
    for start, stop in zip(starts, starts[1:] + [samples], strict=True):
        real = stop - start
        if mode == "full":
            windows.append(Window(start, stop, WINDOW_SAMPLES, FULL_FRAMES))
            continue
        wanted = max(real + round(margin_seconds * SAMPLING_RATE), MIN_SAMPLES)
        padded = min(-(-wanted // FRAME) * FRAME, WINDOW_SAMPLES)
        windows.append(Window(start, stop, padded, -(-real // FRAME)))
    return windows


def encoder_frames(samples: int, mode: Mode) -> int:
    """Number of feature frames (20 ms each in `trim`) that a clip of `samples` yields."""
    return sum(window.frames for window in plan_windows(samples, mode))


def clip_mel(audio: np.ndarray, n_mels: int, mode: Mode, margin_seconds: float) -> Tensor:
    """Log-mels of a clip's windows side by side, (n_mels, T_mel) fp32; needs no weights."""
    windows = plan_windows(len(audio), mode, margin_seconds)
    parts = [log_mel(audio[w.start : w.stop], n_mels, w.padded) for w in windows]
    return torch.cat(parts, dim=1)
