"""Choose how many steps a block of the stream holds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from omni.audio.windows import HOP, plan_windows
from omni.config import Config
from omni.metrics.follower import METRICS
from omni.metrics.run_files import read_json_lines
from omni.plan.plan import Plan
from omni.run.prepare import Prepared
from omni.storage.path import StoragePath
from omni.stream.codec import DTYPES
from omni.stream.encoder_facts import EncoderFacts

_IN_STORE = 4
"""Blocks of each rank that `data.buffer_mb` is to hold."""
_RECENT = 5
"""Lines of metrics that a step's time is the mean of."""
_SAMPLED_BINS = 64
"""Bins of the plan that stand for all in the size of a block."""
_LONGEST_SHARE = 0.1
"""Share of `train.timeout_seconds` that the ranks may wait for a block while it is encoded."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a step: of a rank that never waits, and with the time that it waits for blocks."""

    busy: float
    whole: float


def steps_per_block(prepared: Prepared, encode: bool, workers: int, pace: Pace | None) -> int:
    """Choose the steps of a block by `data.block_seconds` and `data.block_mb`; a power of two.

    pace: that of this run so far, or of the trial before it; without one a block holds one step.
    encode: log-mels travel too.
    """
    if pace is None:
        return 1
    split = prepared.splits["train"]
    samples = split.table["samples"].to_numpy()
    per_bin = bytes_per_bin(split.beginning, samples, prepared.encoder, encode)
    bins = prepared.config.optim.bins_per_step / workers
    return steps_that_fit(prepared.config, pace, per_bin * max(1.0, bins), workers)


def steps_that_fit(config: Config, pace: Pace, size: float, workers: int) -> int:
    """Return the largest power of two of steps that a block may hold.

    size: bytes of a step's bins of one rank.
    """
    data = config.data
    most = float(data.block_mb << 20)
    if data.buffer_mb is not None:
        most = min(most, (data.buffer_mb << 20) / (_IN_STORE * workers))
    steps = min(
        data.block_seconds / max(pace.busy, 1e-6),
        _LONGEST_SHARE * config.train.timeout_seconds / max(pace.whole, 1e-6),
        most / max(size, 1.0),
    )
    return 1 << max(0, int(steps).bit_length() - 1)


def bytes_per_bin(plan: Plan, samples: object, encoder: EncoderFacts, encode: bool) -> float:
    """Estimate the bytes of a bin in the stream: features, or log-mels where they are more.

    samples: (n,) of each utterance.
    """
    bins = min(_SAMPLED_BINS, plan.bins)
    members = plan.members[: int(plan.starts[bins])]
    mel_bytes = encoder.n_mels * DTYPES[encoder.dtype].itemsize
    features = mels = 0
    for length in samples[members].tolist():  # type: ignore[index]
        for window in plan_windows(int(length), encoder.mode, encoder.margin_seconds):
            features += window.frames * encoder.codec.frame_bytes
            mels += window.padded // HOP * mel_bytes
    return (max(features, mels) if encode else features) / max(1, bins)


def recent_pace(run_dir: StoragePath) -> Pace | None:
    """Return the pace of this run so far; None if it has none, or cannot be read now."""
    try:
        logged = (row for row in read_json_lines(run_dir / METRICS) if row.get("kind") == "train")
        rows = list(deque(logged, maxlen=_RECENT + 1))
    except OSError:
        return None
    # A row has the time of the steps since the one before, which is another attempt's at times.
    pairs = [(b, a) for a, b in zip(rows, rows[1:], strict=False) if b["step"] > a["step"]]
    steps = sum(row["step"] - before["step"] for row, before in pairs)
    if not steps:
        return None
    whole = sum(row["step_seconds"] for row, _ in pairs)
    busy = sum(row["step_seconds"] * (1 - row["data_wait_fraction"]) for row, _ in pairs)
    return Pace(busy / steps, whole / steps)
