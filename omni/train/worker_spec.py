"""Settings and facts that the driver gives to every rank of a worker group."""

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
    fingerprints: dict[str, str]
    held_rows: dict[str, int]  # rows of dev and test that lead the stream
    train_rows: int  # utterances of the training index
    epoch_ends: list[int]  # bins up to the end of each epoch
    resume: ResumePoint | None = None
    """Checkpoint that all ranks start from, verified by the driver; None starts at step 0."""
