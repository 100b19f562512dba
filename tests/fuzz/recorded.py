"""A short recording."""

from __future__ import annotations

import functools
import io

import numpy as np
import soundfile


@functools.cache
def sound(seconds: float = 0.5, kind: str = "FLAC") -> bytes:
    """Encode a tone of 16 kHz."""
    file = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(int(16_000 * seconds)) / 9)
    soundfile.write(file, tone, 16_000, format=kind)
    return file.getvalue()
