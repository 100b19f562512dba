"""What every rank of a run is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni.config import Config
from omni.model.omni import OmniConfig


@dataclass(frozen=True)
class Job:
    config: Config
    model: OmniConfig
    encoder: dict[str, Any]  # source, mode, margin_seconds, dtype, fingerprint, d_model, ...
    tokenizer_json: str
    fingerprints: dict[str, str]
    held_rows: dict[str, int]  # rows of dev and test that lead the stream
    train_rows: int  # utterances of the training index
    epoch_ends: list[int]  # bins up to the end of each epoch
