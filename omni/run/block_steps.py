"""Choose how many steps a block of the stream holds."""

from __future__ import annotations

from collections import deque

from omni.audio.windows import FRAME, SAMPLING_RATE
from omni.config.settings import DataConfig
from omni.metrics.follower import METRICS
from omni.metrics.run_files import read_json_lines
from omni.run.estimate import audio_per_step
from omni.run.prepare import Prepared
from omni.storage.path import StoragePath

_MEL_BYTES = 2
_MELS_PER_SECOND = 100
_IN_STORE = 4
"""Blocks of each rank that `data.buffer_mb` is to hold."""
_RECENT = 5
"""Lines of metrics that a step's time is the mean of."""


def steps_per_block(prepared: Prepared, encode: bool, workers: int) -> int:
    """Choose the steps of a block by `data.block_seconds` and `data.block_mb`; a power of two.

    A step's time is that of this run so far, or of the trial before it; without both, a block holds
    one step. encode: log-mels travel too.
    """
    config = prepared.config
    seconds = recent_step_seconds(config.run_dir) or prepared.step_seconds
    if not seconds:
        return 1
    split = prepared.splits["train"]
    audio = audio_per_step(split.beginning, split.table["samples"].to_numpy()) / workers
    per_second = prepared.encoder.codec.frame_bytes * SAMPLING_RATE / FRAME
    if encode:
        per_second = max(per_second, prepared.encoder.n_mels * _MEL_BYTES * _MELS_PER_SECOND)
    return steps_that_fit(config.data, seconds, audio * per_second, workers)


def steps_that_fit(data: DataConfig, seconds: float, size: float, workers: int) -> int:
    """Return the largest power of two of steps that a block may hold.

    seconds: of a step. size: bytes of a step's bins of one rank.
    """
    most = float(data.block_mb << 20)
    if data.buffer_mb is not None:
        most = min(most, (data.buffer_mb << 20) / (_IN_STORE * workers))
    steps = min(data.block_seconds / seconds, most / max(size, 1.0))
    return 1 << max(0, int(steps).bit_length() - 1)


def recent_step_seconds(run_dir: StoragePath) -> float | None:
    """Return the seconds of a step of this run; None if none is logged."""
    logged = (row for row in read_json_lines(run_dir / METRICS) if row.get("kind") == "train")
    rows = list(deque(logged, maxlen=_RECENT + 1))
    # A row has the time of the steps since the one before, which is another attempt's at times.
    pairs = [
        (row["step"] - before["step"], row["step_seconds"])
        for before, row in zip(rows, rows[1:], strict=False)
        if row["step"] > before["step"]
    ]
    return sum(s for _, s in pairs) / sum(n for n, _ in pairs) if pairs else None
