"""Facts that the driver hands to every rank of a worker group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omni.checkpoint.resume import ResumePoint
from omni.config import Config
from omni.model.speech_lm import OmniConfig
from omni.stream.encoder_facts import EncoderFacts


@dataclass(frozen=True)
class WorkerSpec:
    config: Config
    model: OmniConfig
    encoder: EncoderFacts
    tokenizer_json: str
    template: Literal["plain", "chat"]
    tasks: list[str]
    """Names of the tasks; batches refer to them by position."""
    fingerprints: dict[str, str]
    held_bins: dict[str, int]
    """Bins of each held-out split, over all ranks and without padding."""
    held_step: int
    """Step after which the stream brings the held-out bins."""
    train_rows: int
    """Utterances of the training index."""
    epoch_ends: list[int]
    """Bins up to the end of each epoch."""
    nodes: int = 1
    """Nodes of the cluster at the start of the attempt."""
    encoders: int = 1
    """Encoder actors of the stream; 0: the cache holds all features that are left to read."""
    steps_per_block: int = 1
    """Most steps that a block of the stream holds."""
    resume: ResumePoint | None = None
    """Checkpoint that all ranks start from, verified by the driver; None starts at step 0."""
    lease: int | None = None
    """Number of the lease under which the ranks write; None: the run has no driver."""
